// The frame: who asks, which recipe, where one is, and what must be seen from everywhere.
import { call, key, withQuery } from "./api.js";
import { clearNotice, every, field, guarded, h } from "./dom.js";
import { lessonCount } from "./basket.js";
import { bind, showHelp, startKeys } from "./keys.js";
import { app, chooseCategory, chooseRecipe, loadState, may, recipePath, refreshRecipes } from "./state.js";
import { startUploads } from "./upload.js";
import { inspectView } from "./view_inspect.js";
import { reviewView } from "./view_review.js";
import { partView, partsView } from "./view_parts.js";
import { thresholdsView } from "./view_thresholds.js";
import { teachView } from "./view_teach.js";
import { goldenView } from "./view_golden.js";
import { lineView } from "./view_line.js";
import { shiftView } from "./view_shift.js";
import { recipesView } from "./view_recipes.js";
import { auditView } from "./view_audit.js";

const VIEWS = [
  { href: "#/inspect", name: "Inspect", group: "At the line", open: inspectView },
  { href: "#/review", name: "Review", group: "At the line", open: reviewView },
  { href: "#/parts", name: "Parts", group: "At the line", open: partsView },
  { href: "#/thresholds", name: "Thresholds", group: "Quality", open: thresholdsView },
  { href: "#/teach", name: "Teach", group: "Quality", open: teachView },
  { href: "#/golden", name: "Golden samples", group: "Quality", open: goldenView },
  { href: "#/line", name: "Drift and GR&R", group: "Quality", open: lineView },
  { href: "#/shift", name: "Shift report", group: "Quality", open: shiftView },
  { href: "#/recipes", name: "Recipes", group: "Records", open: recipesView },
  { href: "#/audit", name: "Audit log", group: "Records", open: auditView },
];
const PART = { href: "#/part", name: "Part", open: partView };
const counts = { "#/review": "", "#/teach": "" };
let ending = new AbortController();

// ---- where one is ----

function route() {
  const [, name = "inspect", ...rest] = location.hash.split("/");
  const view = name === "part" ? PART : VIEWS.find((each) => each.href === `#/${name}`) || VIEWS[0];
  return { view, args: rest.map(decodeURIComponent) };
}

async function open(focus = true) {
  ending.abort();
  ending = new AbortController();
  const { signal } = ending;
  if (!app.me) return;
  const { view, args } = route();
  const inside = document.getElementById("view").contains(document.activeElement);
  const root = h("div", { "data-view": view.href });
  document.getElementById("view").replaceChildren(root);
  document.title = `${view.name} – anomalyst station`;
  drawNav(view);
  showMenu(false);
  if (focus) clearNotice();
  await guarded(() => view.open(root, { args, signal, bind: (list) => bind(list, signal) }));
  root.dataset.ready = "true";
  const title = root.querySelector("h1");
  if (!title || signal.aborted) return;
  title.tabIndex = -1;
  if (focus || inside) title.focus({ preventScroll: true });
  if (focus) scrollTo(0, 0);
}

function drawNav(current = route().view) {
  const groups = [...new Set(VIEWS.map((view) => view.group))];
  const nav = document.getElementById("nav");
  nav.replaceChildren(
    ...groups.map((group) =>
      h(
        "section",
        {},
        h("h2", {}, group),
        h("ul", {}, VIEWS.filter((view) => view.group === group).map((view) => h("li", {}, link(view, current)))),
      ),
    ),
  );
}

function link(view, current) {
  const count = counts[view.href];
  const mark = count ? h("span.count", {}, count, h("span.visually-hidden", {}, view.href === "#/review" ? " waiting" : " lessons")) : null;
  return h("a", { href: view.href, "aria-current": view === current ? "page" : null }, view.name, mark);
}

// ---- tools in the bar ----

function drawTools() {
  const tools = document.getElementById("tools");
  tools.replaceChildren(...[recipeSelect(), categorySelect(), themeSelect(), helpButton(), who()].filter(Boolean));
}

function recipeSelect() {
  if (!app.recipe) return null;
  const select = h("select", {}, app.recipes.map((each) => h("option", { value: each.name, selected: each === app.recipe }, `${each.name}, v${each.active.number}`)));
  select.addEventListener("change", () => chooseRecipe(select.value));
  return h("label", {}, "Recipe ", select);
}

function categorySelect() {
  if (!app.recipe || app.recipe.categories.length < 2) return null;
  const options = [["", "by likeness"], ...app.recipe.categories.map((each) => [each.name, each.name])];
  const select = h("select", {}, options.map(([value, text]) => h("option", { value, selected: value === app.category }, text)));
  select.addEventListener("change", () => chooseCategory(select.value));
  return h("label", {}, "Product ", select);
}

function themeSelect() {
  const wish = localStorage.getItem("anomalyst-theme") || "auto";
  const names = [["auto", "as the computer"], ["light", "light"], ["dark", "dark"]];
  const select = h("select", { id: "theme" }, names.map(([value, text]) => h("option", { value, selected: value === wish }, text)));
  select.addEventListener("change", () => {
    localStorage.setItem("anomalyst-theme", select.value);
    dispatchEvent(new Event("anomalyst-theme"));
  });
  return h("label", {}, "Screen ", select);
}

const helpButton = () => h("button", { type: "button", onclick: () => showHelp(VIEWS) }, "Shortcuts ", h("kbd", {}, "?"));

function who() {
  const words = app.me ? `${app.me.name}, ${app.me.role}` : "Enter key";
  return h("button", { type: "button", id: "who", onclick: () => keyDialog() }, words);
}

// ---- keys of the service ----

let asking = false;

function keyDialog(why = "") {
  if (asking) return;
  asking = true;
  const input = h("input", { type: "password", autocomplete: "off", required: true, "aria-describedby": "key-why" });
  const words = why || (app.me ? `You are ${app.me.name}, ${app.me.role}${app.me.open ? "; no key is needed at this computer" : ""}.` : "");
  const box = h("dialog", { "aria-labelledby": "key-title" });
  const form = h(
    "form",
    { method: "dialog" },
    h("h2", { id: "key-title" }, "API key"),
    h("p", { id: "key-why", role: why ? "alert" : null }, words),
    h("div.grow", {}, field("Key", input, "an engineer makes one: anomalyst key add NAME --role operator")),
    h("p.hint", {}, "It stays in this tab and is gone when the tab is closed."),
    h("p.row", {}, h("button.main", {}, "Use this key"), forgetButton(box), h("button", { type: "button", onclick: () => box.close() }, "Let it be")),
  );
  form.addEventListener("submit", () => {
    key.set(input.value.trim());
    setTimeout(begin);
  });
  box.append(form);
  box.addEventListener("close", () => {
    asking = false;
    box.remove();
  });
  document.body.append(box);
  box.showModal();
}

function forgetButton(box) {
  if (!key.get()) return null;
  const forget = () => {
    key.clear();
    box.close();
    app.me = null;
    begin();
  };
  return h("button", { type: "button", onclick: forget }, "Forget my key");
}

// ---- what must be seen from everywhere ----

async function watchQueue() {
  if (!app.me) return;
  try {
    const page = await call(withQuery("/inspections", { pending: true, limit: 100, recipe: app.recipe?.name }));
    counts["#/review"] = page.items.length ? `${page.items.length}${page.next ? "+" : ""}` : "";
    const lessons = app.recipe ? lessonCount(app.recipe.name) : 0;
    counts["#/teach"] = lessons && may("engineer") ? String(lessons) : "";
    if (!document.activeElement?.closest("#nav")) drawNav();
  } catch {
    // the bar at the top says that the station is gone; a key that is missing is asked for
  }
}

async function watchDrift() {
  if (!app.me) return;
  try {
    if (await refreshRecipes()) drawTools();
    const found = await Promise.all(app.recipes.map(async ({ name }) => ({ name, ...(await call(recipePath("/drift", name))) })));
    const alarms = found.filter(({ alarm }) => alarm);
    const place = document.getElementById("alarm");
    place.hidden = !alarms.length;
    place.replaceChildren(...alarms.map(alarmLine));
  } catch {
    // as above
  }
}

const alarmLine = ({ name, alarm }) =>
  h("p", {}, h("strong", {}, `The line of ${name} has changed. `), `${alarm.split(" (")[0]}. `, h("a", { href: "#/line" }, "What to do"));

function showGone(gone) {
  const place = document.getElementById("lost");
  if (place.hidden === !gone) return;
  place.hidden = !gone;
  place.replaceChildren(h("p", {}, gone ? "The station does not answer: trying again. What it acknowledged is kept." : ""));
}

function showMenu(on) {
  for (const name of ["nav", "tools"]) document.getElementById(name).classList.toggle("open", on);
  document.getElementById("menu").setAttribute("aria-expanded", String(on));
}

async function begin() {
  const failed = await loadState().then(() => null, (error) => error);
  drawTools();
  drawNav();
  if (!failed) return open();
  const place = document.getElementById("view");
  if (failed.status === 401) place.replaceChildren(h("h1", {}, "A key is needed"), h("p", {}, "Enter an API key (top right) to go on."));
  else place.replaceChildren(h("h1", {}, "The station is not ready"), h("p", {}, `${failed.message} Trying again.`));
  if (failed.status !== 401) setTimeout(begin, 3000);
}

/** Nothing more is asked without a key: what is shown stays until one is entered. */
function locked(why) {
  app.me = null;
  ending.abort();
  keyDialog(why);
}

function start() {
  document.getElementById("menu").addEventListener("click", (event) => {
    showMenu(event.currentTarget.getAttribute("aria-expanded") !== "true");
  });
  addEventListener("hashchange", () => open());
  addEventListener("state", () => (drawTools(), app.me && document.getElementById("view").firstElementChild?.dataset.view && open(false)));
  addEventListener("state", () => (watchQueue(), watchDrift()));
  addEventListener("lessons", watchQueue);
  addEventListener("decided", watchQueue);
  addEventListener("key-needed", (event) => locked(event.detail));
  addEventListener("station-gone", (event) => showGone(event.detail));
  startKeys(VIEWS);
  startUploads();
  const forever = new AbortController().signal;
  begin().then(() => {
    every(5000, watchQueue, forever);
    every(60_000, watchDrift, forever);
  });
}

start();
