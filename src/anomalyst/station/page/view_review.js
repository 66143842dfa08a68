// The queue: parts that wait for a person, one after another, one key each.
import { call, withQuery } from "./api.js";
import { h, plural, redraw } from "./dom.js";
import { decider, facts, promiseLine, teachRow } from "./part.js";
import { viewer } from "./picture.js";
import { app } from "./state.js";
import { band } from "./verdict.js";
import { pictureKeys } from "./view_inspect.js";

export async function reviewView(root, { signal, bind }) {
  const queue = new Queue(root, signal, bind);
  await queue.fill();
  queue.draw();
}

class Queue {
  constructor(root, signal, bind) {
    Object.assign(this, { signal, bind, items: [], at: 0, next: null, last: null });
    this.count = h("p.muted", { role: "status" });
    this.place = h("div");
    root.append(h("div.head", {}, h("h1", {}, "Review"), this.count), this.place);
  }

  async fill() {
    const query = { pending: true, limit: 100, before: this.next, recipe: app.recipe?.name };
    const page = await call(withQuery("/inspections", query), { signal: this.signal });
    this.items.push(...page.items);
    this.next = page.next;
  }

  draw() {
    const part = this.items[this.at];
    const waiting = this.items.filter((each) => !each.decision).length;
    this.count.textContent = waiting ? `${plural(waiting, "part")}${this.next ? " and more" : ""} to decide` : "";
    if (!part) return this.nothing();
    const { element, keys } = viewer(part);
    const deciding = decider(part, (changed) => this.decided(changed));
    const facts_ = [h("strong", {}, part.part_id || part.image), h("span", {}, `${this.at + 1} of ${this.items.length}${this.next ? "+" : ""}`)];
    const side = h("section.card", { "aria-label": "This part" }, part.error ? h("p", {}, part.error) : null, deciding.element, this.moves(), facts(part), teachRow(part));
    redraw(
      this.place,
      band(part, { small: true, facts: facts_ }),
      promiseLine(part),
      h("div.live", {}, h("section.card", { "aria-label": "Picture" }, element), side),
    );
    this.bind([...deciding.keys, ...this.keys(), ...pictureKeys(keys)]);
  }

  keys() {
    return [
      ["ArrowRight", "Next part, this one later", () => this.forward()],
      ["ArrowLeft", "Part before", () => this.before()],
      ["u", "Back to the part decided last", () => this.back()],
    ];
  }

  moves() {
    const before = h("button", { type: "button", disabled: this.at === 0, onclick: () => this.before() }, "← Before");
    const next = h("button", { type: "button", onclick: () => this.forward() }, "Later →");
    const back = h("button", { type: "button", disabled: this.last === null, onclick: () => this.back() }, "Last decided ", h("kbd", {}, "U"));
    return h("div.row", {}, before, next, back);
  }

  nothing() {
    redraw(
      this.place,
      h("div.card", {}, h("h2", {}, "Nothing waits"), h("p", {}, "Every part that was called REVIEW or NG is decided."), this.last === null ? null : this.moves()),
    );
    this.bind(this.keys());
  }

  /** Go to the next part that waits, and behind the last one to those that were put off. */
  async forward() {
    const waits = (each) => !each.decision;
    const ahead = () => this.items.findIndex((each, k) => waits(each) && k > this.at);
    if (ahead() < 0 && this.next) await this.fill();
    let at = ahead() < 0 ? this.items.findIndex(waits) : ahead();
    if (at < 0) at = await this.arrived();
    this.at = at;
    this.draw();
  }

  /** Take in what has come since, and return where it starts. */
  async arrived() {
    const known = new Set(this.items.map((each) => each.id));
    const query = { pending: true, limit: 100, recipe: app.recipe?.name };
    const page = await call(withQuery("/inspections", query), { signal: this.signal });
    const at = this.items.length;
    this.items.push(...page.items.filter((each) => !known.has(each.id)));
    return at;
  }

  before() {
    if (this.at === 0) return;
    this.at -= 1;
    this.draw();
  }

  back() {
    if (this.last === null) return;
    this.at = this.last;
    this.draw();
  }

  async decided(changed) {
    this.items[this.at] = changed;
    this.last = this.at;
    dispatchEvent(new Event("decided"));
    await this.forward();
  }
}
