// Deciding on one part: the panel that the live view, the queue and a part's own page share.
import { call } from "./api.js";
import { action, ask, field, h, notice, number, time } from "./dom.js";
import { app, may, promise, stored } from "./state.js";
import { addDefect, addNormal } from "./basket.js";
import { shape } from "./verdict.js";

/** Facts of a part as a list. */
export function facts(part) {
  const rows = [
    ["Part", part.part_id || "–"],
    ["Picture", part.image],
    ["Product", part.category ?? "–"],
    ["Score", `${number(part.score)}${part.p_value === null ? "" : `, p = ${number(part.p_value, 2)}`}`],
    ["NG above", number(part.threshold)],
    ["REVIEW above", number(part.threshold_review)],
    ["Judged by", `${part.recipe}, version ${part.version}${part.by_hand ? ", thresholds by hand" : ""}`],
    ["At", time(part.created_at)],
    ["Decision", decision(part)],
  ];
  return h("dl.facts-list", {}, rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

function decision(part) {
  if (!part.decision) return "none yet";
  const words = `${part.decision}, by ${part.decided_by}`;
  return part.decision_reason ? `${words}: ${part.decision_reason}` : words;
}

export function promiseLine(part) {
  const recipe = app.recipes.find((each) => each.name === part.recipe);
  if (!recipe || !part.category) return null;
  const { number: active } = recipe.active;
  if (part.version !== active) return h("p.promise.warn", {}, `Judged by version ${part.version}; version ${active} judges now.`);
  const { sure, words } = promise(recipe, part.category);
  return h(`p.promise${sure ? "" : ".warn"}`, {}, words);
}

/** Two big buttons and a reason; `after` gets the changed part. Returns {element, keys}. */
export function decider(part, after, ready = () => true) {
  if (!may("operator")) {
    return { element: h("p.muted", {}, "To decide, enter an operator's key (top right)."), keys: [] };
  }
  const reason = h("input", { maxlength: "2000", list: "reasons", id: "reason", value: part.decision_reason || "" });
  const decide = async (word) => {
    if (!ready()) return;
    const json = { decision: word, reason: reason.value.trim() };
    const changed = await call(`/inspections/${part.id}/decision`, { method: "POST", json });
    remember(json.reason);
    await after(changed);
  };
  const good = choice("good", "Good", "ok", "G", part, decide);
  const defect = choice("defect", "Defect", "ng", "D", part, decide);
  const known = stored.get("reasons", []).map((text) => h("option", { value: text }));
  const element = h(
    "section",
    { "aria-label": "Decision" },
    h("div.decide", {}, good, defect),
    h("div.grow", {}, field("Reason", reason, "may be empty, key R")),
    h("datalist", { id: "reasons" }, known),
  );
  const keys = [
    ["g", "Decide: good", () => good.click()],
    ["d", "Decide: defect", () => defect.click()],
    ["r", "Write a reason", () => reason.focus()],
  ];
  return { element, keys };
}

function choice(word, label, sign, letter, part, decide) {
  const pressed = String(part.decision === word);
  const button = action("", () => decide(word), { kind: `.${word}`, "aria-pressed": pressed, "aria-keyshortcuts": letter });
  button.append(shape(sign), label, h("kbd", { "aria-hidden": "true" }, letter));
  return button;
}

function remember(reason) {
  if (!reason) return;
  const others = stored.get("reasons", []).filter((text) => text !== reason);
  stored.set("reasons", [reason, ...others].slice(0, 12));
}

/** What an engineer does with a part: teach it, make it a golden sample. */
export function teachRow(part) {
  if (!may("engineer") || !part.category || !part.links.image) return null;
  const recipe = app.recipes.find((each) => each.name === part.recipe);
  if (!recipe) return null;
  const row = h("div.row");
  if (recipe.can_teach) {
    row.append(action("Teach as normal", () => addNormal(part)));
    if (!recipe.why_no_defects) row.append(action("Teach the defect …", () => addDefect(part)));
  }
  row.append(action("Golden sample …", () => goldenDialog(part)));
  const whys = [recipe.why_not, recipe.why_no_defects].filter((why, k, all) => why && all.indexOf(why) === k);
  const hint = whys.length ? h("p.hint", {}, `Teaching: ${whys.join("; ")}.`) : null;
  return h("section", { "aria-label": "Teach" }, row, hint);
}

async function goldenDialog(part) {
  const expected = part.decision === "defect" || (!part.decision && part.verdict !== "ok") ? "fail" : "pass";
  const words =
    expected === "pass"
      ? "From now on no change of the recipe may call this picture anything but OK."
      : "From now on no change of the recipe may call this picture OK.";
  const title = expected === "pass" ? "Golden sample: must pass" : "Golden sample: must fail";
  const note = await ask(title, words, { label: "Note", confirm: expected === "pass" ? "Must pass" : "Must fail" });
  if (note === null) return;
  const json = { inspection: part.id, expected, note };
  await call(`/recipes/${encodeURIComponent(part.recipe)}/golden`, { method: "POST", json });
  notice("fine", `Kept as a golden sample: must ${expected}.`);
}

