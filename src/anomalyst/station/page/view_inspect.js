// The live view: the last part as large as can be, the parts before it, pictures in.
import { call, showPicture, withQuery } from "./api.js";
import { clock, every, guarded, h, notice, number, redraw } from "./dom.js";
import { decider, facts, promiseLine, teachRow } from "./part.js";
import { viewer } from "./picture.js";
import { app, promise, refreshRecipes } from "./state.js";
import { sender } from "./upload.js";
import { badge, band, signOf, wordOf } from "./verdict.js";

const SHOWN = 24;
const SETTLE = 900; // ms in which a part that came up by itself cannot be decided by a late hand

export async function inspectView(root, { signal, bind }) {
  const live = new Live(root, signal, bind);
  addEventListener("inspected", () => live.look(), { signal });
  await every(2000, () => live.look(), signal);
}

class Live {
  constructor(root, signal, bind) {
    Object.assign(this, { signal, bind, items: [], shown: "", held: false, byFocus: false, since: 0 });
    this.said = h("p.visually-hidden", { role: "status" });
    this.hold = h("div.hold");
    this.band = h("div");
    this.panel = h("div");
    this.strip = h("ul.strip");
    // Whoever works on a part keeps it: a new one must not come up under the hand.
    this.panel.addEventListener("focusin", (event) => {
      if (this.held || event.target === this.panel.firstElementChild) return;
      this.held = this.byFocus = true;
      this.drawHold();
    });
    this.panel.addEventListener("focusout", (event) => {
      const reason = this.panel.querySelector("#reason");
      if (!this.byFocus || this.panel.contains(event.relatedTarget) || reason?.value) return;
      this.held = this.byFocus = false;
      this.drawHold();
    });
    root.append(
      h("div.head", {}, h("h1", {}, "Inspect"), this.hold),
      this.said,
      this.band,
      this.panel,
      sender(),
      h("section.card", { "aria-label": "Last parts" }, h("h2", {}, "Last parts"), this.strip),
    );
  }

  async look() {
    try {
      const page = await call(withQuery("/inspections", { limit: SHOWN, recipe: app.recipe?.name }), { signal: this.signal });
      await this.update(page.items);
    } catch (error) {
      if (!this.panel.childNodes.length && error.status > 0) notice("bad", error.message);
    }
  }

  async update(items) {
    const before = this.items;
    this.items = items;
    const { recipe: name, version } = items[0] || {};
    if (name === app.recipe?.name && version > app.recipe.active.number) await refreshRecipes();
    if (!items.length) return this.empty();
    if (this.held) {
      this.drawHold();
    } else if (items[0].id !== this.shown) {
      this.show(items[0], Boolean(before.length));
    }
    if (JSON.stringify(before) !== JSON.stringify(items)) this.drawStrip();
  }

  empty() {
    const words = app.recipe ? "No part was inspected yet." : "There is no recipe yet: upload a bundle under Recipes.";
    const known = app.recipe?.categories.map((each) => promise(app.recipe, each.name)) || [];
    const lines = known.map(({ sure, words: text }) => h(`p.promise${sure ? "" : ".warn"}`, {}, text));
    this.band.replaceChildren(h("div.band.none.small", {}, h("p.word", {}, "READY"), h("div.facts", {}, words)), ...lines);
    this.strip.replaceChildren(h("li.muted", {}, "none"));
    this.bind([]);
  }

  show(part, byItself = false) {
    this.shown = part.id;
    this.since = byItself ? performance.now() : 0;
    const name = part.part_id || part.image;
    const lines = [h("strong", {}, name), h("span", {}, `score ${number(part.score, 3)}`), h("span", {}, clock(part.created_at))];
    this.band.replaceChildren(band(part, { facts: lines }), promiseLine(part) || "");
    if (byItself) this.said.textContent = `${name}: ${wordOf(part)}`;
    const { element, keys } = viewer(part);
    const deciding = decider(part, (changed) => this.decided(changed), () => this.settled());
    const side = h("section.card", { "aria-label": "This part" }, part.error ? h("p", {}, part.error) : null, deciding.element, facts(part), teachRow(part));
    redraw(this.panel, h("div.live", {}, h("section.card", { "aria-label": "Picture" }, element), side));
    this.bind([
      ...deciding.keys,
      ["h", "Hold this part, or follow the line", () => this.toggle()],
      ["ArrowRight", "Earlier part", () => this.step(1)],
      ["ArrowLeft", "Later part", () => this.step(-1)],
      ...pictureKeys(keys),
    ]);
    this.drawHold();
    this.drawStrip();
  }

  /** Whether the part was seen long enough to be meant. */
  settled() {
    if (performance.now() - this.since > SETTLE) return true;
    notice("warn", "A new part came up just now: look at it, then press again.");
    return false;
  }

  async decided(changed) {
    this.items = this.items.map((each) => (each.id === changed.id ? changed : each));
    dispatchEvent(new Event("decided"));
    notice("fine", `${changed.part_id || changed.image}: decided ${changed.decision}.`);
    if (this.byFocus) this.held = this.byFocus = false;
    this.show(changed);
  }

  toggle() {
    this.held = !this.held;
    this.byFocus = false;
    if (!this.held && this.items[0]) this.show(this.items[0]);
    else this.drawHold();
  }

  step(by) {
    const at = this.items.findIndex((each) => each.id === this.shown) + by;
    if (!this.items[at]) return;
    this.held = at > 0;
    this.show(this.items[at]);
  }

  drawHold() {
    const at = this.items.findIndex((each) => each.id === this.shown);
    const newer = at < 0 ? `${SHOWN} or more newer` : `${at} newer`;
    const words = this.held ? `Held; ${newer}` : "Following the line";
    const label = this.held ? "Follow the line " : "Hold this part ";
    const button = h("button", { type: "button", "aria-pressed": String(this.held), onclick: () => this.toggle() }, label, h("kbd", {}, "H"));
    const had = this.hold.contains(document.activeElement);
    this.hold.replaceChildren(h("span.muted", {}, words), button);
    if (had) button.focus();
  }

  drawStrip() {
    const at = [...this.strip.children].findIndex((each) => each.contains(document.activeElement));
    this.strip.replaceChildren(...this.items.map((part) => h("li", {}, this.thumb(part))));
    if (at >= 0) this.strip.children[at]?.querySelector("button")?.focus();
  }

  thumb(part) {
    const pick = () => {
      this.held = true;
      this.show(part);
      scrollTo({ top: 0 });
    };
    const picture = part.links.image ? h("img", { alt: "", loading: "lazy" }) : h("span.blank");
    if (part.links.image) showPicture(picture, withQuery(part.links.image, { side: 240 }));
    return h(
      `button.thumb.${signOf(part)}`,
      { type: "button", "aria-current": String(part.id === this.shown), onclick: () => guarded(async () => pick()) },
      picture,
      h("span.label", {}, badge(signOf(part)), h("span.name", {}, part.part_id || part.image), h("span.muted", {}, part.decision ? `decided ${part.decision}` : clock(part.created_at))),
    );
  }
}

export function pictureKeys(keys) {
  const words = { m: "Map on or off", o: "Outlines on or off", z: "Zoom" };
  return Object.entries(keys).map(([name, work]) => [name, words[name], work]);
}
