// What is to be taught, collected from parts until it is tried and saved under Teach.
import { h, notice } from "./dom.js";
import { markDefect } from "./marker.js";

const PLACE = "anomalyst-lessons";

export function lessons(recipe, category) {
  return all().filter((each) => each.recipe === recipe && each.category === category);
}

export const lessonCount = (recipe) => all().filter((each) => each.recipe === recipe).length;

function all() {
  return JSON.parse(sessionStorage.getItem(PLACE) || "[]");
}

function keep(list) {
  try {
    sessionStorage.setItem(PLACE, JSON.stringify(list));
  } catch {
    throw new Error("The browser has no room for more lessons: save or remove some under Teach first.");
  }
  dispatchEvent(new Event("lessons"));
}

export function forget(id) {
  keep(all().filter((each) => each.id !== id));
}

export function forgetAll(recipe, category) {
  keep(all().filter((each) => each.recipe !== recipe || each.category !== category));
}

function add(part, more) {
  const { id, recipe, category, image, part_id: partId, links } = part;
  keep([...all().filter((each) => each.id !== id), { id, recipe, category, image, partId, picture: links.image, ...more }]);
}

export async function addNormal(part) {
  if (part.decision === "defect") throw new Error("This part was decided a defect: change the decision first.");
  add(part, { label: "normal" });
  notice("fine", "To be taught as normal. Try it and save it under Teach.");
}

export async function addDefect(part) {
  if (part.decision === "good") throw new Error("This part was decided good: change the decision first.");
  const marked = await markDefect(part);
  if (!marked) return;
  add(part, { label: "abnormal", ...marked });
  notice("fine", "To be taught as a defect. Try it and save it under Teach.");
}

/** A lesson list as the service takes it. */
export function request(list) {
  return {
    normal: list.filter((each) => each.label === "normal").map((each) => each.id),
    abnormal: list
      .filter((each) => each.label === "abnormal")
      .map(({ id, box, mask }) => (mask ? { id, mask } : { id, box })),
  };
}

export const lessonWords = (each) =>
  each.label === "normal"
    ? h("span.verdict.ok", {}, "normal")
    : h("span.verdict.ng", {}, each.mask ? "defect, brushed" : `defect, box ${each.box.join(", ")}`);
