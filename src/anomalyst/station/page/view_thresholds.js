// Thresholds: moved on the histogram, tried on labelled history, then saved as a new version.
import { call, withQuery } from "./api.js";
import { action, field, h, notice, number, percent } from "./dom.js";
import { countsList, goldenList } from "./counts.js";
import { Histogram } from "./histogram.js";
import { app, loadRecipes, may, oneCategory, promise, recipePath } from "./state.js";

export async function thresholdsView(root, { signal }) {
  root.append(h("h1", {}, "Thresholds"));
  if (!app.recipe || !oneCategory()) return void root.append(h("p", {}, "There is no recipe with a product yet."));
  const history = await call(withQuery(recipePath("/history"), { category: oneCategory() }), { signal });
  new Bench(root, history, signal);
}

class Bench {
  constructor(root, history, signal) {
    Object.assign(this, { history, signal, timer: 0, asked: 0 });
    const { ng, review } = history.thresholds;
    this.saved = { ng, review };
    this.levels = { ng, review };
    this.inputs = { review: this.input("review"), ng: this.input("ng") };
    this.figures = h("div", { role: "status" });
    this.golden = h("div");
    this.note = h("input", { maxlength: "2000", id: "threshold-note" });
    const chart = h("div.chart");
    root.append(this.intro(), h("section.card", { "aria-label": "Scores" }, this.legend(), chart, this.fields()));
    root.append(h("section.card", { "aria-label": "What labelled history says" }, h("h2", {}, "Labelled history under these thresholds"), this.figures, this.golden, this.saving()));
    this.chart = new Histogram(chart, this.series(), this.levels, (levels) => this.moved(levels));
    this.figures.replaceChildren(countsList(history.confusion));
    this.try();
  }

  series() {
    const of = (label) => this.history.scores.filter((each) => each.label === label).map((each) => each.score);
    return { calibration: this.history.calibration, good: of("good"), defect: of("defect") };
  }

  intro() {
    const { sure, words } = promise(app.recipe, this.history.category);
    const { n_good: good, n_defect: defect } = this.history.confusion;
    const few = good + defect === 0 ? "No part is decided yet: decide some under Review or Parts, and they show here." : "";
    const left = this.history.left_out ? ` ${this.history.left_out} decided parts are left out: the recipe was made of them.` : "";
    return h("div", {}, h(`p.promise${sure ? "" : ".warn"}`, {}, words), h("p.muted", {}, `${this.history.category}: ${good} good and ${defect} defective parts decided. ${few}${left}`));
  }

  legend() {
    const entry = (name, words) => h("li", {}, h(`i.${name}`), words);
    return h("ul.legend", {}, entry("good", "decided good, upwards"), entry("defect", "decided defect, downwards"), entry("calibration", "calibration, to a scale of its own"));
  }

  input(name) {
    const made = h("input", { type: "number", step: "any", value: shown(this.levels[name]), disabled: !may("engineer") });
    made.addEventListener("input", () => {
      const value = made.value === "" ? null : Number(made.value);
      const levels = { ...this.levels, [name]: value };
      this.chart.set(levels);
      this.moved(levels, name);
    });
    return made;
  }

  fields() {
    const { alpha, alpha_review: both } = this.history.thresholds;
    const hint = `The calibration aims at ${percent(alpha)} NG and ${percent(both)} NG or REVIEW among good parts. Move the lines by pointer or arrow keys; an empty field is no threshold.`;
    return h("div", {}, h("div.row", {}, field("REVIEW above", this.inputs.review), field("NG above", this.inputs.ng)), h("p.hint", {}, hint));
  }

  saving() {
    if (!may("engineer")) return h("p.muted", {}, "Only an engineer may try and save thresholds.");
    this.save = action("Save as a new version", () => this.store(), { kind: ".main" });
    const back = action("Take up the calibration again", () => this.store({ ng: null, review: null }));
    const undo = action("As they are now", () => (this.chart.set(this.saved), this.moved(this.saved)));
    back.hidden = !this.history.thresholds.by_hand;
    const warn = h("p.hint", {}, "Thresholds set by hand promise no rate of false rejects; the page and every record say so.");
    return h("div", {}, h("div.row", {}, h("div.grow", {}, field("Why", this.note)), this.save, undo, back), warn);
  }

  moved(levels, typed = null) {
    this.levels = levels;
    for (const [name, input] of Object.entries(this.inputs)) if (name !== typed) input.value = shown(levels[name]);
    this.figures.replaceChildren(countsList(this.counted(levels), this.history.confusion));
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.try(), 250);
  }

  /** Count at once what the service confirms a moment later. */
  counted({ ng, review }) {
    const above = (score, level) => level !== null && score > level;
    const made = { n_good: 0, n_defect: 0, false_rejects: 0, misses: 0, reviews: 0 };
    for (const { score, label } of this.history.scores) {
      const isNg = above(score, ng);
      const isReview = !isNg && above(score, review);
      made[label === "good" ? "n_good" : "n_defect"] += 1;
      if (isReview) made.reviews += 1;
      if (isNg && label === "good") made.false_rejects += 1;
      if (!isNg && !isReview && label === "defect") made.misses += 1;
    }
    return made;
  }

  async try() {
    if (!may("engineer")) return;
    const turn = (this.asked += 1);
    const json = { category: this.history.category, ...this.wanted() };
    try {
      const found = await call(recipePath("/thresholds/preview"), { method: "POST", json, signal: this.signal });
      if (turn !== this.asked) return;
      this.figures.replaceChildren(countsList(found, found.before));
      this.golden.replaceChildren(goldenList(found.golden));
      this.save.disabled = found.blocked || this.same();
    } catch (error) {
      if (error.name === "AbortError" || turn !== this.asked) return;
      this.golden.replaceChildren(h("p.notice.bad", {}, error.message));
      this.save.disabled = true;
    }
  }

  same() {
    return this.levels.ng === this.saved.ng && this.levels.review === this.saved.review;
  }

  /** Untouched levels of a calibration are asked for as such, not as numbers by hand. */
  wanted() {
    return this.same() && !this.history.thresholds.by_hand ? { ng: null, review: null } : this.levels;
  }

  async store(levels = this.levels) {
    const json = { category: this.history.category, ...levels, note: this.note.value.trim() };
    const version = await call(recipePath("/thresholds"), { method: "POST", json });
    await loadRecipes();
    const { ng, review } = levels;
    const words = ng === null && review === null ? "the calibration judges again" : `NG above ${number(ng)}, REVIEW above ${number(review)}`;
    notice("fine", `Version ${version.number} judges from now on: ${words}.`);
  }
}

const shown = (level) => (level === null ? "" : number(level, 5));
