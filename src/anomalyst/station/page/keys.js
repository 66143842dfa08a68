// One-key commands: the view says which, the person may switch them off, ? lists them.
import { h } from "./dom.js";
import { stored } from "./state.js";

let commands = [];

/** Let a view's keys count until it ends: [[key, words, work], ...]. */
export function bind(list, signal) {
  commands = list;
  signal.addEventListener("abort", () => {
    if (commands === list) commands = [];
  });
}

const typing = (target) => target.closest("input:not([type=checkbox]):not([type=range]), select, textarea, dialog, [role=slider]");

const SCANNER = 60; // ms: no hand types two keys so fast, a code scanner does

/** Run commands by single keys; what a scanner types is no command but a "scanned" event. */
export function startKeys(views) {
  let typed = "";
  let timer = 0;
  const end = () => {
    const text = typed;
    typed = "";
    clearTimeout(timer);
    if (text.length > 1) dispatchEvent(new CustomEvent("scanned", { detail: text }));
    else if (text) run(text, views);
  };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && typing(event.target) && !event.target.closest("dialog")) event.target.blur();
    if (typing(event.target) || event.repeat || event.key === " ") return; // a key under something decides nothing
    if (event.key === "Enter" && typed.length > 1) {
      event.preventDefault(); // the scanner's own, not for the button that has the focus
      end();
    } else if (event.key.length > 1) {
      if (run(event.key, views)) event.preventDefault();
    } else {
      event.preventDefault();
      typed += event.key;
      clearTimeout(timer);
      timer = setTimeout(end, SCANNER);
    }
  });
}

/** Do what a key stands for; tells whether it stands for anything. */
function run(pressed, views) {
  if (!stored.get("keys", true)) return false;
  if (pressed === "?") {
    showHelp(views);
    return true;
  }
  const named = pressed.length === 1 ? pressed.toLowerCase() : pressed;
  const found = commands.find(([name]) => name === named);
  const view = /^[0-9]$/.test(named) ? views[(Number(named) + 9) % 10] : null;
  if (found) found[2]();
  else if (view) location.hash = view.href;
  return Boolean(found || view);
}

export function showHelp(views) {
  const on = h("input", { type: "checkbox", checked: stored.get("keys", true) });
  on.addEventListener("change", () => stored.set("keys", on.checked));
  const rows = [...commands, ...views.map((view, k) => [String((k + 1) % 10), view.name])];
  const close = h("button.main", { type: "button" }, "Close");
  const box = h(
    "dialog",
    { "aria-labelledby": "help-title" },
    h("h2", { id: "help-title" }, "Shortcuts"),
    h("label.check", {}, on, "One-key commands"),
    h(
      "table.keys-table",
      {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Key"), h("th", { scope: "col" }, "Does"))),
      h("tbody", {}, rows.map(([name, words]) => h("tr", {}, h("td", {}, h("kbd", {}, shown(name))), h("td", {}, words)))),
    ),
    h("p", {}, close),
  );
  close.addEventListener("click", () => box.close());
  box.addEventListener("close", () => box.remove());
  document.body.append(box);
  box.showModal();
}

const shown = (name) => ({ ArrowRight: "→", ArrowLeft: "←", Enter: "Enter" })[name] || name.toUpperCase();
