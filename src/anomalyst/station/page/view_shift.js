// The shift on paper: a page of its own, to print or to save as PDF.
import { withQuery } from "./api.js";
import { field, h } from "./dom.js";
import { app } from "./state.js";
import { moment } from "./view_parts.js";

const HOUR = 3_600_000;

export async function shiftView(root) {
  root.append(h("h1", {}, "Shift report"));
  if (!app.recipe) return void root.append(h("p", {}, "There is no recipe yet."));
  const since = h("input", { type: "datetime-local", value: local(Date.now() - 8 * HOUR) });
  const until = h("input", { type: "datetime-local", value: local(Date.now() + 60_000) });
  const link = h("a.button.main", { target: "_blank" }, "Open the report to print");
  const point = () => {
    const asked = { recipe: app.recipe.name, since: moment(since.value), until: moment(until.value) };
    link.href = withQuery("/page/report.html", asked);
  };
  for (const input of [since, until]) input.addEventListener("input", point);
  point();
  // A link does not take the key of this tab along; a window that this one opens does.
  link.addEventListener("click", (event) => {
    event.preventDefault();
    open(link.href, "_blank");
  });
  root.append(
    h("p.muted", {}, "Parts by verdict, decisions and by whom, changes of the recipe, drift, and a place to sign."),
    h("section.card.row", { "aria-label": "Which hours" }, field("From", since), field("Until", until), link),
    h("p.hint", {}, "Times of this computer; the report itself is in UTC."),
  );
}

function local(at) {
  const moved = new Date(at - new Date(at).getTimezoneOffset() * 60_000);
  return moved.toISOString().slice(0, 16);
}
