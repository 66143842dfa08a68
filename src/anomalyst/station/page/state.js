// What all views share: who asks, the recipes, which recipe and category are chosen.
import { call } from "./api.js";

export const app = { me: null, recipes: [], recipe: null, category: "" };

const ROLES = ["viewer", "operator", "engineer"];
export const may = (role) => app.me !== null && ROLES.indexOf(app.me.role) >= ROLES.indexOf(role);

export const stored = {
  get: (name, otherwise) => JSON.parse(localStorage.getItem(`anomalyst-${name}`) ?? JSON.stringify(otherwise)),
  set: (name, value) => localStorage.setItem(`anomalyst-${name}`, JSON.stringify(value)),
};

export async function loadState() {
  app.me = await call("/me");
  await loadRecipes();
}

/** Take note of what others changed; views stay as they are. */
export async function refreshRecipes() {
  const found = await call("/recipes");
  const changed = JSON.stringify(found) !== JSON.stringify(app.recipes);
  app.recipes = found;
  app.recipe = found.find((each) => each.name === app.recipe?.name) || found[0] || null;
  return changed;
}

export async function loadRecipes() {
  app.recipes = await call("/recipes");
  const wanted = stored.get("recipe", "");
  app.recipe = app.recipes.find((each) => each.name === wanted) || app.recipes[0] || null;
  const category = stored.get("category", "");
  const known = app.recipe ? app.recipe.categories.map((each) => each.name) : [];
  app.category = known.includes(category) ? category : "";
  dispatchEvent(new Event("state"));
}

export function chooseRecipe(name) {
  stored.set("recipe", name);
  stored.set("category", "");
  app.recipe = app.recipes.find((each) => each.name === name) || null;
  app.category = "";
  dispatchEvent(new Event("state"));
}

export function chooseCategory(name) {
  stored.set("category", name);
  app.category = name;
  dispatchEvent(new Event("state"));
}

/** The category that a view of one category is about: the chosen one, or else the first. */
export function oneCategory() {
  return app.category || app.recipe?.categories[0]?.name || "";
}

export const recipePath = (rest = "", name = app.recipe?.name ?? "") => `/recipes/${encodeURIComponent(name)}${rest}`;

/** What the recipe promises of a category, in words; `sure` is false where it promises nothing. */
export function promise(recipe, category) {
  const known = recipe.categories.find((each) => each.name === category);
  if (!known) return { sure: false, words: "This recipe knows no product yet: teach it good parts, or upload another bundle." };
  if (recipe.active.thresholds?.[category]) {
    return { sure: false, words: "Thresholds set by hand: no rate of false rejects is promised." };
  }
  const rates = Object.entries(known.needed_for).sort((a, b) => Number(a[0]) - Number(b[0]));
  if (!known.calibrated) return { sure: false, words: uncalibrated(rates) };
  const [ng, review] = [rates[0], rates[rates.length - 1]];
  const said = [];
  if (ng[1] === 0) said.push(`at most ${share(ng[0])} of good parts are called NG`);
  if (review !== ng && review[1] === 0) said.push(`at most ${share(review[0])} are called NG or REVIEW`);
  const missing = rates.filter(([, n]) => n > 0).map(([rate, n]) => `${n} more normal pictures for ${share(rate)}`);
  const start = `Calibrated on ${known.n_calibration} normal pictures: `;
  const rest = missing.length ? ` Still needed: ${missing.join(", ")}.` : "";
  return { sure: missing.length === 0, words: `${start}${said.join("; ") || "too few for any verdict"}.${rest}` };
}

const share = (rate) => `${Number((100 * Number(rate)).toPrecision(3))}\u00a0%`;

function uncalibrated(rates) {
  const needed = rates.map(([rate, n]) => `${n} for ${share(rate)}`).join(", ");
  return `Not calibrated: scores only, no verdicts. Normal pictures needed by rate of false rejects: ${needed}.`;
}
