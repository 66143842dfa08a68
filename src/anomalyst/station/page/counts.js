// What became of labelled parts: the few figures that matter, before and after.
import { h, line, percent, plural, table } from "./dom.js";
import { showPicture, withQuery } from "./api.js";
import { badge } from "./verdict.js";

/** Figures of `after`, compared with `before` where it is given. */
export function countsList(after, before = null) {
  const figure = (title, name, total, extra = "") => {
    const change = before ? after[name] - before[name] : 0;
    const mark = change === 0 || ["reviews", "unjudged"].includes(name) ? "" : change > 0 ? ".worse" : ".better";
    const was = before ? h("span.hint", {}, change === 0 ? " (as now)" : ` (now ${before[name]})`) : null;
    return h(
      `div${mark}`,
      {},
      h("dt", {}, title),
      h("dd", {}, h("span.big", {}, after[name]), ` of ${total}`, was, extra ? h("div.hint", {}, extra) : null),
    );
  };
  const most = (rate) => (rate === null || rate === undefined ? "" : `true rate at most ${percent(rate)} (95 % sure)`);
  return h(
    "dl.counts",
    {},
    figure("False rejects: good, called NG", "false_rejects", after.n_good, most(after.false_rejects_at_most)),
    figure("Misses: defective, called OK", "misses", after.n_defect, most(after.misses_at_most)),
    figure("To be reviewed", "reviews", after.n_good + after.n_defect),
    after.unjudged ? figure("Without any verdict: not calibrated", "unjudged", after.n_good + after.n_defect) : null,
  );
}

/** Golden samples under a change; says first whether it may be saved. */
export function goldenList(samples) {
  if (!samples.length) return h("p.hint", {}, "No golden samples guard this recipe yet.");
  const broken = samples.filter((each) => !each.holds && each.held_before);
  const words = broken.length
    ? `${broken.length} of ${samples.length} golden samples would break: this change cannot be saved.`
    : `${plural(samples.length, "golden sample")}: all that held still hold.`;
  return h("div", {}, h(`p.notice.${broken.length ? "bad" : "fine"}`, {}, words), broken.length ? goldenTable(broken) : null);
}

export function goldenTable(samples, extra = null) {
  const heads = ["Part", "Expected", "Judged", "Holds", "Note", "Product", ...(extra ? ["Change"] : [])];
  const rows = samples.map((each) =>
    line(
      each.inspection ? mini(each.inspection) : "–",
      each.expected === "pass" ? "must pass" : "must fail",
      badge(each.verdict),
      h("strong", {}, each.holds ? "yes" : each.held_before ? "would break" : "no"),
      each.note || "–",
      each.category,
      ...(extra ? [extra(each)] : []),
    ),
  );
  return table(heads, rows, { caption: "Golden samples", empty: "No golden samples yet." });
}

/** A small picture of a part by its id. */
export function mini(id) {
  const picture = h("img.mini", { alt: "", loading: "lazy" });
  showPicture(picture, withQuery(`/api/v1/inspections/${id}/image`, { side: 160 }));
  return h("a", { href: `#/part/${id}`, "aria-label": "Open this part" }, picture);
}
