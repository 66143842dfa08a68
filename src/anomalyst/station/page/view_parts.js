// All parts: looked for, listed, exported; and one part by itself.
import { call, download, showPicture, withQuery } from "./api.js";
import { action, field, guarded, h, line, notice, number, redraw, table, time } from "./dom.js";
import { decider, facts, promiseLine, teachRow } from "./part.js";
import { viewer } from "./picture.js";
import { app } from "./state.js";
import { badge, band, signOf } from "./verdict.js";
import { pictureKeys } from "./view_inspect.js";

export async function partsView(root, { signal }) {
  const inputs = {
    verdict: choice([["", "any"], ["ok", "OK"], ["review", "REVIEW"], ["ng", "NG"]]),
    decision: choice([["", "any"], ["good", "good"], ["defect", "defect"]]),
    part_id: h("input", { maxlength: "200" }),
    since: h("input", { type: "datetime-local" }),
    until: h("input", { type: "datetime-local" }),
  };
  const place = h("div");
  const asked = () => ({
    recipe: app.recipe?.name,
    verdict: inputs.verdict.value,
    decision: inputs.decision.value,
    part_id: inputs.part_id.value.trim(),
    since: moment(inputs.since.value),
    until: moment(inputs.until.value),
  });
  const show = () => guarded(() => list(place, asked(), signal));
  const form = h(
    "form.row",
    { onsubmit: (event) => (event.preventDefault(), show()) },
    field("Verdict", inputs.verdict),
    field("Decided", inputs.decision),
    field("Part id", inputs.part_id),
    field("From", inputs.since),
    field("Until", inputs.until),
    h("button.main", {}, "Show"),
    action("Save as CSV", () => download(withQuery("/inspections.csv", asked()), "inspections.csv")),
    action("Save as JSON lines", () => download(withQuery("/inspections.jsonl", asked()), "inspections.jsonl")),
  );
  root.append(h("h1", {}, "Parts"), h("section.card", { "aria-label": "Filter" }, form), place);
  await list(place, asked(), signal);
}

const choice = (options) => h("select", {}, options.map(([value, text]) => h("option", { value }, text)));
export const moment = (local) => (local ? new Date(local).toISOString() : "");

async function list(place, asked, signal) {
  const rows = [];
  let before = null;
  const more = action("Show more", () => next());
  const draw = () => {
    const heads = ["Picture", "Verdict", "#Score", "Part", "When", "Decision", "Judged by"];
    place.replaceChildren(table(heads, rows, { caption: "Parts", empty: "No part is like that." }), before ? more : "");
  };
  const next = async () => {
    const page = await call(withQuery("/inspections", { ...asked, before, limit: 50 }), { signal });
    rows.push(...page.items.map(row));
    before = page.next;
    draw();
  };
  await next();
}

function row(part) {
  const name = part.part_id || part.image;
  const picture = part.links.image ? h("img.mini", { alt: "", loading: "lazy" }) : "–";
  if (part.links.image) showPicture(picture, withQuery(part.links.image, { side: 160 }));
  return line(
    picture,
    badge(signOf(part)),
    h("td.n", {}, number(part.score)),
    h("a", { href: `#/part/${part.id}` }, name),
    h("td.no-wrap", {}, time(part.created_at)),
    part.decision ? `${part.decision}, ${part.decided_by}` : "–",
    `version ${part.version}`,
  );
}

export async function partView(root, { args, signal, bind }) {
  const part = await call(`/inspections/${args[0] || ""}`, { signal });
  root.append(h("h1", {}, part.part_id || part.image));
  const place = h("div");
  root.append(place);
  draw(place, part, bind);
}

function draw(place, part, bind) {
  const { element, keys } = viewer(part);
  const after = (changed) => {
    dispatchEvent(new Event("decided"));
    notice("fine", `Decided ${changed.decision}.`);
    draw(place, changed, bind);
  };
  const deciding = decider(part, after);
  const side = h("section.card", { "aria-label": "This part" }, part.error ? h("p", {}, part.error) : null, deciding.element, facts(part), teachRow(part));
  redraw(
    place,
    band(part, { small: true }),
    promiseLine(part),
    h("div.live", {}, h("section.card", { "aria-label": "Picture" }, element), side),
  );
  bind([...deciding.keys, ...pictureKeys(keys)]);
}
