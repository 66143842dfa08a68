// Who did what, and the proof that nobody changed it since.
import { call, withQuery } from "./api.js";
import { action, h, line, plural, table, time } from "./dom.js";

export async function auditView(root, { signal }) {
  const result = h("div", { role: "status" });
  const list = h("div");
  const verify = action("Verify the whole log", async () => {
    result.replaceChildren(h("p.notice", {}, "Verifying …"));
    result.replaceChildren(verdict(await call("/audit/verify", { signal })));
  }, { kind: ".main" });
  root.append(
    h("div.head", {}, h("h1", {}, "Audit log"), verify),
    h("p.muted", {}, "Every row carries the hash of the one before it: a row that is changed, taken out or put in breaks the chain."),
    result,
    list,
  );
  await pages(list, signal);
}

function verdict(found) {
  const words = `${plural(found.rows, "row")}, ${plural(found.inspections, "inspection")}. Newest hash: `;
  if (found.ok) return h("p.notice.fine", {}, h("span", {}, h("strong", {}, "The log is whole. "), words, h("span.mono", {}, found.head)));
  const faults = found.faults.map((each) => h("li", {}, each));
  return h("div.notice.bad", {}, h("div", {}, h("p", {}, h("strong", {}, "The log does not hold. "), words, h("span.mono", {}, found.head)), h("ul", {}, faults)));
}

async function pages(place, signal) {
  const rows = [];
  let before = null;
  const more = action("Show more", () => next());
  const next = async () => {
    const page = await call(withQuery("/audit", { before, limit: 50 }), { signal });
    rows.push(...page.items.map(row));
    before = page.next;
    place.replaceChildren(table(["#No.", "When", "Who", "What", "Of", "Detail", "Hash"], rows, { caption: "Audit log" }), before ? more : "");
  };
  await next();
}

function row(each) {
  const subject = each.subject.startsWith("inspection:")
    ? h("a", { href: `#/part/${each.subject.slice(11)}` }, "this part")
    : each.subject;
  return line(
    h("td.n", {}, each.seq),
    h("td.no-wrap", {}, time(each.at)),
    each.actor,
    each.action,
    subject,
    h("td", {}, h("details.detail", {}, h("summary", {}, "Show"), h("span.mono", {}, each.detail))),
    h("td.mono", { title: each.hash }, each.hash.slice(0, 10)),
  );
}
