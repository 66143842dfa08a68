// Verdicts by colour, shape and word at once: each alone suffices.
import { h, s } from "./dom.js";

const WORDS = { ok: "OK", review: "REVIEW", ng: "NG", none: "NO VERDICT", error: "UNREADABLE" };

const SHAPES = {
  ok: () => [s("circle", { cx: 12, cy: 12, r: 10.5 }), mark("M7 12.5l3.4 3.4L17 8.6")],
  review: () => [s("path", { d: "M12 1.2 23.4 22H.6z" }), mark("M12 9v6M12 18.3v.4")],
  ng: () => [s("path", { d: "M7.4 1h9.2L23 7.4v9.2L16.6 23H7.4L1 16.6V7.4z" }), mark("M8 8l8 8M16 8l-8 8")],
  none: () => [s("rect", { x: 2, y: 2, width: 20, height: 20, rx: 3 }), mark("M7 12h10")],
};

const mark = (d) =>
  s("path.mark", { d, "stroke-width": 2.6, "stroke-linecap": "round" });

/** What a part's sign is: its verdict, or why it has none. */
export function signOf(part) {
  if (part.error) return "error";
  return part.verdict || "none";
}

export const wordOf = (part) => WORDS[signOf(part)];

export function shape(sign) {
  const drawn = SHAPES[sign === "error" ? "none" : sign]();
  return s("svg", { viewBox: "0 0 24 24", fill: "currentColor", "aria-hidden": "true" }, drawn);
}

export function badge(sign) {
  const style = sign === "error" ? "none" : sign || "none";
  return h(`span.verdict.${style}`, {}, shape(style), WORDS[sign || "none"]);
}

/** The big band: to be read from across the aisle. */
export function band(part, { small = false, facts = [] } = {}) {
  const sign = signOf(part);
  const style = sign === "error" ? "none" : sign;
  const made = h(`div.band.${style}`, {}, shape(style), h("p.word", {}, WORDS[sign]), h("div.facts", {}, facts));
  if (small) made.classList.add("small");
  return made;
}

export const DECISIONS = { good: "good", defect: "defect" };

export function decisionText(part) {
  if (!part.decision) return "not decided";
  return `decided ${part.decision} by ${part.decided_by}${part.decision_reason ? `: ${part.decision_reason}` : ""}`;
}
