// Recipes: what judges and what it promises, versions to go back to, bundles in, folders watched.
import { call, withQuery } from "./api.js";
import { action, ask, field, h, line, notice, number, plural, table, time } from "./dom.js";
import { app, chooseRecipe, loadRecipes, may, promise, recipePath } from "./state.js";

export async function recipesView(root, { signal }) {
  root.append(h("h1", {}, "Recipes"));
  if (app.recipe) root.append(limits(app.recipe));
  if (app.recipe) root.append(await versions(signal));
  root.append(await watching(signal));
  if (may("engineer")) root.append(uploading());
}

function limits(recipe) {
  const lines = recipe.categories.map((each) => {
    const { sure, words } = promise(recipe, each.name);
    const known = `${plural(each.n_normal, "normal reference")}, ${each.n_abnormal} of defects`;
    return h("div", {}, h("h3", {}, each.name, h("span.hint", {}, ` ${known}`)), h(`p.promise${sure ? "" : ".warn"}`, {}, words));
  });
  const model = `${recipe.method}, ${recipe.kind === "export" ? "exported" : "bundle"}, version ${recipe.active.number} of ${recipe.versions}`;
  return h("section.card", { "aria-label": "What judges" }, h("h2", {}, recipe.name), h("p.muted", {}, model), lines.length ? lines : h("p.promise.warn", {}, "Knows no product yet."));
}

// ---- versions ----

async function versions(signal) {
  const list = await call(recipePath("/versions"), { signal });
  const active = list.find((each) => each.active);
  const rows = list.map((each) =>
    line(
      h("td.no-wrap", {}, h("strong", {}, each.number), each.active ? " judges now" : ""),
      h("td.no-wrap", {}, time(each.created_at)),
      each.created_by,
      each.note || "–",
      thresholdWords(each),
      h("td.mono", { title: each.bundle_sha256 }, each.bundle_sha256.slice(0, 10)),
      each.active || !may("engineer") ? "" : switcher(each, active),
    ),
  );
  const heads = ["Version", "Made", "By", "Note", "Thresholds", "Bundle", "Change"];
  return h("section.card", { "aria-label": "Versions" }, h("h2", {}, "Versions"), table(heads, rows, { caption: "Versions" }));
}

function thresholdWords(version) {
  const set = Object.entries(version.thresholds || {});
  if (!set.length) return "by calibration";
  return set.map(([name, { ng, review }]) => `${name} by hand: REVIEW ${number(review)}, NG ${number(ng)}`).join("; ");
}

function switcher(version, active) {
  const back = active && version.number < active.number;
  const label = back ? "Roll back" : "Let it judge";
  return action(`${label} …`, async () => {
    const title = `${label}${back ? " to" : ":"} version ${version.number}?`;
    const words = "It judges from the next part on. Earlier results stay as they are.";
    const note = await ask(title, words, { label: "Why", confirm: label });
    if (note === null) return;
    await call(recipePath("/activate"), { method: "POST", json: { number: version.number, note } });
    await loadRecipes();
    notice("fine", `Version ${version.number} judges from now on.`);
  }, { "aria-label": `${label} to version ${version.number}` });
}

// ---- bundles in ----

function uploading() {
  const file = h("input", { type: "file", accept: ".zip,application/zip" });
  const name = h("input", { maxlength: "100", placeholder: "as the file" });
  const note = h("input", { maxlength: "2000" });
  const send = action("Upload and check", async () => {
    const chosen = file.files[0];
    if (!chosen) throw new Error("Choose a bundle's .zip first.");
    const called = name.value.trim() || chosen.name.replace(/\.zip$/i, "");
    notice("fine", "Uploading; every hash is checked and the model is loaded …");
    const made = await call(withQuery("/recipes", { name: called, note: note.value.trim() }), { method: "POST", body: chosen, type: "application/zip" });
    chooseRecipe(made.name);
    await loadRecipes();
    notice("fine", `${made.name}, version ${made.active.number}, judges from now on.`);
  }, { kind: ".main" });
  return h(
    "section.card",
    { "aria-label": "Upload a bundle" },
    h("h2", {}, "Upload a bundle or export"),
    h("div.row", {}, field("File", file, ".zip"), field("Recipe", name, "an existing name makes a new version"), h("div.grow", {}, field("Note", note)), send),
  );
}

// ---- folders ----

async function watching(signal) {
  const place = h("section.card", { "aria-label": "Watched folders" });
  drawFolders(place, await call("/watch", { signal }));
  return place;
}

function drawFolders(place, folders) {
  const rows = folders.map((each) =>
    line(h("td.mono", {}, each.folder), each.recipe, each.category ?? "by likeness", h("td.n", {}, each.inspected), each.error ? h("strong", {}, each.error) : "watched", may("engineer") ? stopper(place, each) : ""),
  );
  const list = table(["Folder", "Recipe", "Product", "#Pictures", "State", "Change"], rows, { caption: "Watched folders", empty: "No folder is watched." });
  place.replaceChildren(h("h2", {}, "Watched folders"), list, may("engineer") ? adding(place) : "");
}

function stopper(place, each) {
  const stop = async () => {
    if ((await ask("Stop watching?", each.folder, { confirm: "Stop" })) === null) return;
    drawFolders(place, await call(withQuery("/watch", { folder: each.folder }), { method: "DELETE" }));
  };
  return action("Stop …", stop, { "aria-label": `Stop watching ${each.folder}` });
}

function adding(place) {
  const folder = h("input", { maxlength: "200", placeholder: "/data/camera-1" });
  const add = action("Watch", async () => {
    const json = { folder: folder.value.trim(), recipe: app.recipe?.name ?? null, category: app.category || null };
    if (!json.folder) throw new Error("Name a folder of the station's computer first.");
    drawFolders(place, await call("/watch", { method: "POST", json }));
    notice("fine", "Watched: every picture in it is inspected once.");
  });
  return h("div.row", {}, h("div.grow", {}, field("Folder where the camera writes", folder, "on the station's computer")), add);
}
