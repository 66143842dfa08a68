// The shift report as its own page, for keys too: a link alone cannot carry one.
import { call, withQuery } from "./api.js";

const asked = new URLSearchParams(location.search);
const wanted = { since: asked.get("since"), until: asked.get("until") };

try {
  const path = `/recipes/${encodeURIComponent(asked.get("recipe") || "")}/shift`;
  show(await call(withQuery(path, wanted), { as: "text" }));
} catch (error) {
  document.body.textContent = error.message;
}

/** The report brings its style with it; the page's policy refuses inline styles, but not sheets. */
function show(text) {
  const styles = [];
  const rest = text.replace(/<style>([^]*?)<\/style>/g, (_, style) => (styles.push(style), ""));
  const report = new DOMParser().parseFromString(rest, "text/html");
  document.adoptedStyleSheets = styles.map((style) => {
    const sheet = new CSSStyleSheet();
    sheet.replaceSync(style);
    return sheet;
  });
  document.title = report.title;
  document.body.replaceChildren(...[...report.body.childNodes].map((node) => document.importNode(node, true)));
}
