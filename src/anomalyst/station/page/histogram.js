// Scores of labelled parts and calibration, with thresholds that pointer and keys move.
import { number, s } from "./dom.js";

const HEIGHT = 270;
const BASE = 165; // good parts stand above this line, defects hang below it
const TOP = 46;
const BOTTOM = 248;
const SIDE = 16;
const BINS = 48;

export class Histogram {
  /** `series`: {calibration, good, defect} lists of scores; `levels`: {ng, review}, may be null. */
  constructor(place, series, levels, onchange) {
    Object.assign(this, { place, series, levels, onchange });
    const all = [...series.calibration, ...series.good, ...series.defect, levels.ng, levels.review].filter((x) => x !== null);
    const low = Math.min(...all, 0.0);
    const high = all.length ? Math.max(...all, low + 1e-9) : 1;
    const pad = 0.06 * (high - low);
    this.range = [Math.max(low - pad, low < 0 ? low - pad : 0), high + pad];
    new ResizeObserver(() => this.draw()).observe(place);
    this.draw();
  }

  x(score) {
    const [low, high] = this.range;
    return SIDE + ((score - low) / (high - low)) * (this.width - 2 * SIDE);
  }

  score(x) {
    const [low, high] = this.range;
    const share = Math.min(1, Math.max(0, (x - SIDE) / (this.width - 2 * SIDE)));
    return low + share * (high - low);
  }

  draw() {
    const width = Math.max(240, Math.floor(this.place.clientWidth));
    if (!this.place.isConnected || width === this.width) return;
    const focused = this.place.contains(document.activeElement) ? document.activeElement.dataset?.level : null;
    this.width = width;
    const svg = s("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "group", "aria-label": "Scores of labelled parts, with thresholds" });
    this.zones = s("g");
    svg.append(this.zones, this.bars(), this.axis());
    this.handles = { review: this.handle("review"), ng: this.handle("ng") };
    svg.append(this.handles.ng, this.handles.review); // REVIEW's label lies over NG's line
    this.place.replaceChildren(svg);
    this.place_();
    if (focused) this.handles[focused].focus();
  }

  bars() {
    const group = s("g", { "aria-hidden": "true" });
    const counted = Object.fromEntries(Object.entries(this.series).map(([name, list]) => [name, this.counted(list)]));
    const most = Math.max(1, ...counted.good, ...counted.defect);
    const ground = Math.max(1, ...counted.calibration);
    const wide = (this.width - 2 * SIDE) / BINS;
    const put = (name, k, share, up, inset) => {
      const tall = Math.max(3, (up ? BASE - TOP - 18 : BOTTOM - BASE - 8) * share);
      const y = up ? BASE - tall : BASE;
      group.append(s(`rect.${name}`, { x: SIDE + k * wide + inset, y, width: Math.max(1, wide - 2 * inset), height: tall }));
    };
    for (let k = 0; k < BINS; k += 1) {
      if (counted.calibration[k]) put("calibration", k, counted.calibration[k] / ground, true, 0);
      if (counted.good[k]) put("good", k, counted.good[k] / most, true, wide * 0.22);
      if (counted.defect[k]) put("defect", k, counted.defect[k] / most, false, wide * 0.22);
    }
    return group;
  }

  counted(list) {
    const bins = new Array(BINS).fill(0);
    const [low, high] = this.range;
    for (const score of list) bins[Math.min(BINS - 1, Math.max(0, Math.floor((BINS * (score - low)) / (high - low))))] += 1;
    return bins;
  }

  axis() {
    const [low, high] = this.range;
    const group = s("g", { "aria-hidden": "true" }, s("line.axis", { x1: SIDE, x2: this.width - SIDE, y1: BASE, y2: BASE }));
    const ticks = this.width < 480 ? 3 : 6;
    for (let k = 0; k <= ticks; k += 1) {
      const score = low + (k / ticks) * (high - low);
      const anchor = k === 0 ? "start" : k === ticks ? "end" : "middle";
      group.append(s("text", { x: this.x(score), y: HEIGHT - 4, "text-anchor": anchor }, number(score, 3)));
    }
    return group;
  }

  handle(name) {
    const word = name === "ng" ? "NG" : "REVIEW";
    const y = name === "ng" ? 2 : 24;
    const wide = name === "ng" ? 44 : 76;
    const group = s(
      `g.handle.${name}`,
      { role: "slider", tabindex: 0, "aria-label": `${word} above`, "data-level": name, "aria-orientation": "horizontal" },
      s("rect.reach", { x: -18, y, width: 36, height: BOTTOM - y }),
      s("line", { x1: 0, x2: 0, y1: y, y2: BOTTOM }),
      s("rect.label", { x: -wide / 2, y, width: wide, height: 22 }),
      s("text", { x: 0, y: y + 16 }, word),
    );
    group.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      group.focus();
      group.setPointerCapture(event.pointerId);
      group.addEventListener("pointermove", drag);
    });
    const drag = (event) => this.move(name, this.score(this.local(event)));
    group.addEventListener("pointerup", () => group.removeEventListener("pointermove", drag));
    group.addEventListener("keydown", (event) => this.key(name, event));
    return group;
  }

  local(event) {
    const box = this.place.firstChild.getBoundingClientRect();
    return ((event.clientX - box.left) / box.width) * this.width;
  }

  key(name, event) {
    const [low, high] = this.range;
    const step = (high - low) / 200;
    const by = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10 }[event.key];
    const to = { Home: low, End: high }[event.key];
    if (by === undefined && to === undefined) return;
    event.preventDefault();
    this.move(name, to ?? (this.levels[name] ?? high) + by * step * (event.shiftKey ? 10 : 1));
  }

  /** Move a level; REVIEW never lies above NG, so the other goes along. */
  move(name, score) {
    const [low, high] = this.range;
    const value = Number(Math.min(high, Math.max(low, score)).toPrecision(5));
    const levels = { ...this.levels, [name]: value };
    if (levels.ng !== null && levels.review !== null && levels.review > levels.ng) levels[name === "ng" ? "review" : "ng"] = value;
    this.set(levels);
    this.onchange(levels);
  }

  set(levels) {
    this.levels = levels;
    this.place_();
  }

  place_() {
    const [low, high] = this.range;
    for (const [name, handle] of Object.entries(this.handles)) {
      const level = this.levels[name];
      const shown = Math.min(high, Math.max(low, level ?? high));
      handle.setAttribute("transform", `translate(${this.x(shown)} 0)`);
      handle.setAttribute("opacity", level === null ? 0.45 : 1);
      for (const [key, value] of [["min", low], ["max", high], ["now", shown]]) handle.setAttribute(`aria-value${key}`, number(value, 5));
      handle.setAttribute("aria-valuetext", level === null ? "none" : number(level, 5));
    }
    const [review, ng, end] = [this.levels.review ?? this.levels.ng, this.levels.ng, this.width - SIDE];
    const zone = (kind, from, to) => s(`rect.${kind}`, { x: from, y: TOP, width: Math.max(0, to - from), height: BOTTOM - TOP });
    const start = ng === null ? end : this.x(Math.min(high, ng));
    this.zones.replaceChildren(
      ...(review === null ? [] : [zone("zone-review", this.x(Math.max(low, review)), start)]),
      ...(ng === null ? [] : [zone("zone-ng", start, end)]),
    );
  }
}
