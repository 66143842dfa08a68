// Teaching: what was collected, what history would look like with it, saved as a new version.
import { call, withQuery } from "./api.js";
import { action, field, h, line, notice, number, plural, table } from "./dom.js";
import { forget, forgetAll, lessonWords, lessons, request } from "./basket.js";
import { countsList, goldenList, mini } from "./counts.js";
import { app, loadRecipes, may, oneCategory, recipePath } from "./state.js";
import { badge } from "./verdict.js";

export async function teachView(root) {
  root.append(h("h1", {}, "Teach"));
  if (!app.recipe || !oneCategory()) return void root.append(h("p", {}, "There is no recipe with a product yet."));
  const { recipe } = app;
  if (!may("engineer")) root.append(h("p.notice.warn", {}, h("p", {}, "Only an engineer may teach: enter such a key (top right).")));
  if (!recipe.can_teach) return void root.append(h("p.notice.warn", {}, h("p", {}, `This recipe cannot be taught: ${recipe.why_not}.`)));
  if (recipe.why_no_defects) root.append(h("p.promise.warn", {}, `Normal parts only: ${recipe.why_no_defects}.`));
  await new Desk(root, recipe.name, oneCategory()).askPictures();
}

class Desk {
  constructor(root, recipe, category) {
    Object.assign(this, { recipe, category });
    this.collected = h("section.card", { "aria-label": "Collected" });
    this.pictures = h("section.card", { "aria-label": "Pictures of the calibration", hidden: true });
    this.found = h("div", { role: "status" });
    root.append(
      h("p.muted", {}, `What is collected here becomes references of ${category}. Nothing changes for the line until it is saved.`),
      this.collected,
      this.pictures,
      this.found,
    );
    this.draw();
  }

  /** Offer to give back what calibrated the recipe: with it, teaching keeps the promise. */
  async askPictures() {
    const known = await call(withQuery(recipePath("/calibration"), { category: this.category }));
    this.drawPictures(known);
  }

  drawPictures({ pictures, here }) {
    this.pictures.hidden = here >= pictures || !may("engineer");
    const input = h("input", { type: "file", accept: "image/*", multiple: true });
    const give = action("Give them back", () => this.give([...input.files]));
    this.pictures.replaceChildren(
      h("h2", {}, `Calibration: ${here} of its ${pictures} pictures are here`),
      h("p.hint", {}, "A taught recipe is calibrated anew, by the pictures that calibrated it before. Give them back once, and its promise stays as it is."),
      h("div.row", {}, field("Pictures", input, "the files that anomalyst fit or calibrate got"), give),
    );
  }

  async give(files) {
    if (!files.length) throw new Error("Choose pictures first.");
    const refused = [];
    for (const file of files) {
      const type = file.type.startsWith("image/") ? file.type : "application/octet-stream";
      const options = { method: "POST", body: file, type };
      try {
        this.drawPictures(await call(recipePath("/calibration"), options));
      } catch (error) {
        if (error.status === 0) throw error;
        refused.push(`${file.name}: ${error.message}`);
      }
    }
    const taken = plural(files.length - refused.length, "picture");
    notice(refused.length ? "warn" : "fine", [`${taken} taken`, ...refused.slice(0, 3)].join(". "));
  }

  draw() {
    const list = lessons(this.recipe, this.category);
    const how = h("p", {}, "Open a part under Inspect, Review or Parts and press “Teach as normal” or “Teach the defect”.");
    if (!list.length) return void this.collected.replaceChildren(h("h2", {}, "Nothing collected yet"), how);
    this.calibration = h("input", { type: "checkbox" });
    const check = h("label.check", {}, this.calibration, "Calibrate with decided good parts, too");
    const items = list.map((each) => h("li", {}, mini(each.id), h("div", {}, lessonWords(each), h("div.small", {}, each.partId || each.image)), this.remover(each)));
    this.collected.replaceChildren(
      h("h2", {}, `Collected: ${list.length}`),
      h("ul.lessons", {}, items),
      check,
      h("p.hint", {}, "Otherwise only the pictures that calibrated before, as far as the station has them."),
      h("div.row", {}, action("See what would change", () => this.preview(), { kind: ".main" }), action("Forget them all", () => this.clear())),
    );
  }

  remover(each) {
    return action("Remove", () => {
      forget(each.id);
      this.found.replaceChildren();
      this.draw();
    }, { "aria-label": `Remove ${each.partId || each.image}` });
  }

  clear() {
    forgetAll(this.recipe, this.category);
    this.found.replaceChildren();
    this.draw();
  }

  async preview() {
    this.found.replaceChildren(h("p.notice", {}, h("span", {}, "Learning in a copy, and judging history by it …")));
    const calibration = this.calibration.checked ? "history" : "kept";
    const json = { category: this.category, ...request(lessons(this.recipe, this.category)), calibration };
    try {
      this.show(await call(recipePath("/teach/preview"), { method: "POST", json }));
    } catch (error) {
      this.found.replaceChildren();
      throw error;
    }
  }

  show(found) {
    const note = h("input", { maxlength: "2000", id: "teach-note" });
    const save = action("Save as a new version", () => this.save(found.token, note.value.trim()), { kind: ".main", disabled: found.blocked });
    const heads = ["Part", "Decided", "Now", "Then", "#Score now", "#then"];
    const rows = found.changed.map((each) =>
      line(mini(each.id), each.label, badge(each.before), badge(each.after), h("td.n", {}, number(each.score_before)), h("td.n", {}, number(each.score_after))),
    );
    this.found.replaceChildren(
      h(
        "section.card",
        { "aria-label": "What would change" },
        h("h2", {}, "Labelled history, judged with it"),
        countsList(found.after, found.before),
        this.worse(found),
        h(`p.promise${Object.values(found.calibration.needed_for).some((n) => n > 0) ? ".warn" : ""}`, {}, found.calibration.words),
        h("h3", {}, "Parts with another verdict"),
        table(heads, rows, { caption: "Parts with another verdict", empty: "None." }),
        h("h3", {}, "Golden samples"),
        goldenList(found.golden),
        h("div.row", {}, h("div.grow", {}, field("Why", note)), save),
      ),
    );
  }

  /** Say loudly what numbers alone would let slip. */
  worse({ before, after }) {
    const said = [];
    if (after.misses > before.misses) said.push(`${after.misses - before.misses} more defective parts would be called OK`);
    if (after.false_rejects > before.false_rejects) said.push(`${after.false_rejects - before.false_rejects} more good parts would be called NG`);
    return said.length ? h("p.notice.bad", {}, h("span", {}, h("strong", {}, "Worse than now: "), `${said.join("; ")}.`)) : null;
  }

  async save(token, note) {
    const version = await call(recipePath("/teach"), { method: "POST", json: { token, note } });
    forgetAll(this.recipe, this.category);
    await loadRecipes();
    notice("fine", `Version ${version.number} judges from now on. Roll back under Recipes.`);
  }
}
