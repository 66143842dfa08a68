// Pictures in: dropped, pasted, chosen. Each is sent until it is acknowledged or refused.
import { call, withQuery } from "./api.js";
import { h, notice, plural } from "./dom.js";
import { app, may } from "./state.js";

const AT_ONCE = 3;
const TRIES = 20;
const waiting = [];
let running = 0;
let done = 0;
let total = 0;
const failed = [];

/** Queue files; `partId` stands for all of them. */
export function send(files, partId = "") {
  const pictures = [...files];
  if (!pictures.length) return;
  if (!may("operator")) return void notice("bad", "Only an operator or engineer may inspect: enter such a key (top right).");
  if (!app.recipe) return void notice("bad", "There is no recipe to judge by: upload a bundle under Recipes first.");
  if (running === 0 && waiting.length === 0) {
    done = total = 0;
    failed.length = 0;
  }
  const order = { recipe: app.recipe.name, category: app.category, part_id: partId, source: "page" };
  for (const file of pictures) waiting.push({ file, order });
  total += pictures.length;
  location.hash = "#/inspect";
  const field = partField();
  if (field) field.value = ""; // the next part is another one
  for (let k = running; k < AT_ONCE; k += 1) work();
  show();
}

async function work() {
  const next = waiting.shift();
  if (!next) return;
  running += 1;
  try {
    const made = await sendOne(next);
    dispatchEvent(new CustomEvent("inspected", { detail: made }));
  } catch (error) {
    failed.push(`${next.file.name || "picture"}: ${error.message}`);
  }
  running -= 1;
  done += 1;
  show();
  work();
}

async function sendOne({ file, order }) {
  const path = withQuery("/inspections", { ...order, name: (file.name || "pasted picture").slice(-200) });
  const type = file.type.startsWith("image/") ? file.type : "application/octet-stream";
  for (let tried = 1; ; tried += 1) {
    try {
      return await call(path, { method: "POST", body: file, type });
    } catch (error) {
      // Busy or gone for a moment: nothing was stored, so it is sent again.
      if (![429, 503].includes(error.status) || tried === TRIES) throw error;
      await new Promise((wake) => setTimeout(wake, 1000 * (error.retry || 2)));
    }
  }
}

function show() {
  const place = document.getElementById("sent");
  const parts = [];
  if (done < total) {
    const bar = h("progress", { max: total, value: done, "aria-label": "Pictures sent" });
    parts.push(h("div.notice", {}, h("div", {}, h("p", {}, `${done} of ${plural(total, "picture")} inspected`), bar)));
  }
  if (failed.length) {
    const lines = failed.slice(0, 8).map((text) => h("li", {}, text));
    const more = failed.length > 8 ? h("p", {}, `and ${failed.length - 8} more`) : null;
    const close = h("button", { type: "button", onclick: () => (failed.splice(0), show()) }, "Close");
    const words = h("div", {}, h("p", {}, `${plural(failed.length, "picture")} not inspected:`), h("ul", {}, lines), more);
    parts.push(h("div.notice.bad", { role: "alert" }, words, close));
  }
  place.replaceChildren(...parts);
}

/** Drop and paste work wherever the page is. */
export function startUploads() {
  const cover = document.getElementById("drop");
  const carries = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
  addEventListener("dragover", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    cover.hidden = false;
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) cover.hidden = true;
  });
  addEventListener("drop", (event) => {
    cover.hidden = true;
    if (!carries(event)) return;
    event.preventDefault();
    send(event.dataTransfer.files, partField()?.value.trim());
  });
  addEventListener("scanned", (event) => {
    if (partField()) partField().value = event.detail;
  });
  addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files || [])];
    if (files.length) send(files, partField()?.value.trim());
  });
}

const partField = () => document.getElementById("part-id");

/** The strip with the buttons. */
export function sender() {
  const input = h("input.visually-hidden", { type: "file", accept: "image/*", multiple: true, id: "choose", tabIndex: -1, "aria-hidden": "true" });
  input.addEventListener("change", () => {
    send(input.files, partField().value.trim());
    input.value = "";
  });
  const choose = h("button.main", { type: "button", onclick: () => input.click() }, "Choose pictures");
  const part = h("input", { id: "part-id", maxlength: "200", autocomplete: "off", placeholder: "scan it at any time, or type" });
  return h(
    "section.send",
    { "aria-label": "Inspect pictures" },
    h("p", {}, h("strong", {}, "Drop or paste pictures here"), h("br"), h("span.hint", {}, "or let the camera's folder be watched (Recipes)")),
    h("label", {}, "Part id ", h("span.hint", {}, "may be empty"), h("br"), part),
    choose,
    input,
  );
}
