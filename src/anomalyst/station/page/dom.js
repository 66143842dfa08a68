// Small helpers: elements, numbers and times as text, buttons that report what went wrong.

const SVG = "http://www.w3.org/2000/svg";
const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "textContent", "tabIndex", "selected", "required", "multiple"]);

/** Make an element: h("p.muted", {id: "x", onclick: f}, "text", child). */
export function h(what, attributes = {}, ...children) {
  const [name, ...classes] = what.split(".");
  return fill(document.createElement(name || "div"), classes, attributes, children);
}

/** The same for SVG. */
export function s(what, attributes = {}, ...children) {
  const [name, ...classes] = what.split(".");
  return fill(document.createElementNS(SVG, name), classes, attributes, children);
}

function fill(element, classes, attributes, children) {
  element.classList.add(...classes);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (PROPERTIES.has(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const number = (value, figures = 4) =>
  value === null || value === undefined ? "–" : String(Number(Number(value).toPrecision(figures)));

export const percent = (rate, figures = 2) =>
  rate === null || rate === undefined ? "–" : `${number(100 * rate, figures)}\u00a0%`;

export const plural = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;

const two = (n) => String(n).padStart(2, "0");

/** A moment of the service in this computer's time, the same on every computer of a plant. */
export function when(text) {
  const at = moment(text);
  const day = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
  return `${day} ${clock(text)}`;
}

export function clock(text) {
  const at = moment(text);
  return `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
}

/** The service writes UTC, with or without saying so. */
function moment(text) {
  return new Date(/(Z|[+-]\d\d:?\d\d)$/.test(text) ? text : `${text}Z`);
}

export const time = (text) => h("time", { datetime: text, title: `${text} UTC` }, when(text));

/** Say something above the view: "bad", "warn" or "fine"; the newest replaces the last. */
export function notice(kind, text) {
  const close = h("button", { type: "button", onclick: clearNotice }, "Close");
  const role = kind === "bad" ? "alert" : "status";
  document.getElementById("notice").replaceChildren(h(`div.notice.${kind}`, { role }, h("p", {}, text), close));
}

export function clearNotice() {
  document.getElementById("notice").replaceChildren();
}

/** Run something; what goes wrong is said in one line. Returns whether all went well. */
export async function guarded(work) {
  try {
    await work();
    return true;
  } catch (error) {
    if (error.name !== "AbortError") notice("bad", error.message);
    return false;
  }
}

/** A button that does one thing at a time. */
export function action(label, work, attributes = {}) {
  const { kind = "", ...rest } = attributes;
  const button = h(`button${kind}`, { type: "button", ...rest }, label);
  button.addEventListener("click", async () => {
    if (button.getAttribute("aria-busy")) return;
    button.setAttribute("aria-busy", "true");
    await guarded(work);
    button.removeAttribute("aria-busy");
  });
  return button;
}

/** Do something now and every so often while the page is seen, until the signal ends it. */
export function every(ms, work, signal) {
  let timer = 0;
  const turn = async () => {
    if (!document.hidden) await work();
    if (!signal.aborted) timer = setTimeout(turn, ms);
  };
  signal.addEventListener("abort", () => clearTimeout(timer));
  return turn();
}

/** Replace what a place shows; a focus that was inside goes to its first element. */
export function redraw(place, ...children) {
  const inside = place.contains(document.activeElement);
  place.replaceChildren(...children.filter(Boolean));
  if (!inside || !place.firstElementChild) return;
  place.firstElementChild.tabIndex = -1;
  place.firstElementChild.focus({ preventScroll: true });
}

export function field(label, input, hint = "") {
  return h("label", {}, label, hint ? h("span.hint", {}, ` ${hint}`) : null, h("br"), input);
}

export function table(heads, rows, { caption = "", empty = "Nothing yet." } = {}) {
  if (!rows.length) return h("p.muted", {}, empty);
  const head = heads.map((text) => h(text.startsWith("#") ? "th.n" : "th", { scope: "col", role: "columnheader" }, text.replace("#", "")));
  for (const row of rows) [...row.cells].forEach((cell, k) => (cell.dataset.head = heads[k].replace("#", "")));
  return h(
    "div.scroll",
    { tabindex: "0", role: "region", "aria-label": `Table: ${caption || heads.join(", ").replaceAll("#", "")}` },
    h("table.stacks", { role: "table" }, h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, head)), h("tbody", { role: "rowgroup" }, rows)),
  );
}

/** A row for `table`. Narrow screens stack its cells: roles keep it a table for screen readers. */
export function line(...cells) {
  const made = cells.map((cell) => (cell?.tagName === "TD" ? cell : h("td", {}, cell ?? "–")));
  made.forEach((cell) => cell.setAttribute("role", "cell"));
  return h("tr", { role: "row" }, made);
}

/** Ask in the page, not by a box of the browser: resolves to the text, or null where it is let be. */
export function ask(title, words, { label = "", confirm = "Yes" } = {}) {
  return new Promise((resolve) => {
    const input = label ? h("input", { maxlength: "2000" }) : null;
    const box = h("dialog", { "aria-label": title });
    const done = (value) => {
      box.close();
      box.remove();
      resolve(value);
    };
    const form = h(
      "form",
      { method: "dialog", onsubmit: (event) => (event.preventDefault(), done(input ? input.value : "")) },
      h("h2", {}, title),
      h("p", {}, words),
      input ? h("div.grow", {}, field(label, input)) : null,
      h("p.row", {}, h("button.main", {}, confirm), h("button", { type: "button", onclick: () => done(null) }, "Let it be")),
    );
    box.append(form);
    box.addEventListener("cancel", () => done(null));
    document.body.append(box);
    box.showModal();
  });
}
