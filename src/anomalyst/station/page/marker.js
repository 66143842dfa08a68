// Saying where a defect is: a box (pointer, arrow keys, numbers) or a brush.
import { showPicture } from "./api.js";
import { field, h } from "./dom.js";
import { peakOf } from "./picture.js";

const COLOUR = "#00e5ff"; // no picture's own colour, nor the map's

/** Open the dialog; resolves to {box}, {mask} (base64 PNG) or null. */
export function markDefect(part) {
  return new Promise((resolve) => {
    const picture = h("img", { alt: `Picture of ${part.part_id || part.image}`, draggable: "false" });
    const canvas = h("canvas", { tabIndex: 0, role: "img", "aria-label": "Where the defect is. Arrow keys move the box, with Shift they size it." });
    const box = h("dialog.wide", { "aria-labelledby": "mark-title" });
    const done = (value) => {
      box.close();
      box.remove();
      resolve(value);
    };
    const words = h("p.hint", {}, "Loading the picture …");
    box.append(
      h("h2", { id: "mark-title" }, "Where is the defect?"),
      words,
      h("div.mark-area", {}, picture, canvas),
    );
    box.addEventListener("cancel", () => done(null));
    const ready = async () => start(new Marker(picture, canvas, part, await peakOf(part)), box, words, done);
    picture.addEventListener("load", ready, { once: true });
    picture.addEventListener("error", () => (words.textContent = "The picture could not be loaded."));
    box.append(h("p.row", {}, h("button", { type: "button", onclick: () => done(null) }, "Let it be")));
    document.body.append(box);
    box.showModal();
    showPicture(picture, part.links.image);
  });
}

function start(marker, box, words, done) {
  words.textContent = "Draw a box around it, or brush over it. Mark all of it and little else.";
  const fields = ["x", "y", "width", "height"].map((name, k) => {
    const input = h("input", { type: "number", min: k < 2 ? 0 : 1, value: marker.box[k] });
    input.addEventListener("input", () => marker.setBox(marker.box.map((old, at) => (at === k ? Number(input.value) : old)), false));
    return input;
  });
  const show = () => fields.forEach((input, k) => document.activeElement !== input && (input.value = marker.box[k]));
  marker.onbox = show;
  const boxes = h("div.box-fields", {}, ["Left", "Top", "Width", "Height"].map((name, k) => field(name, fields[k])));
  const size = h("input", { type: "range", min: 2, max: 60, value: 14, "aria-label": "Brush size" });
  size.addEventListener("input", () => (marker.brush = Number(size.value)));
  const brush = h("div.row.middle", { hidden: true }, h("label.slider", {}, "Brush ", size), h("button", { type: "button", onclick: () => marker.clear() }, "Clear"));
  const modes = ["Box", "Brush"].map((name) => h("button", { type: "button", "aria-pressed": String(name === "Box") }, name));
  const choose = (mode) => {
    marker.mode = mode;
    modes.forEach((button) => button.setAttribute("aria-pressed", String(button.textContent === mode)));
    boxes.hidden = mode !== "Box";
    brush.hidden = mode !== "Brush";
    marker.draw();
  };
  modes.forEach((button) => button.addEventListener("click", () => choose(button.textContent)));
  const take = h("button.main", { type: "button" }, "Teach this place");
  take.addEventListener("click", () => {
    const value = marker.result();
    if (value) done(value);
    else words.textContent = "Nothing is marked yet: brush over the defect, or draw a box.";
  });
  words.after(h("div.row.middle", { role: "group", "aria-label": "Way of marking" }, modes));
  box.lastChild.prepend(take);
  box.lastChild.before(boxes, brush);
  marker.canvas.focus();
  marker.draw();
}

/** Box and brush on one picture, in the picture's own pixels. */
class Marker {
  constructor(picture, canvas, part, [across, down]) {
    this.canvas = canvas;
    this.width = picture.naturalWidth;
    this.height = picture.naturalHeight;
    const shrink = Math.min(1, 1400 / Math.max(this.width, this.height));
    canvas.width = Math.round(this.width * shrink);
    canvas.height = Math.round(this.height * shrink);
    this.scale = canvas.width / this.width;
    this.paint = h("canvas", { width: canvas.width, height: canvas.height });
    this.painted = false;
    this.brush = 14;
    this.mode = "Box";
    this.onbox = () => {};
    const region = [...part.regions].sort((a, b) => b.score - a.score)[0];
    const [wide, tall] = [this.width / 5, this.height / 5];
    this.box = this.inside(region ? region.bbox : [across * this.width - wide / 2, down * this.height - tall / 2, wide, tall]);
    const ratio = this.width / this.height;
    canvas.parentElement.style.width = `min(100%, ${ratio} * 54vh)`;
    this.listen();
  }

  inside([x, y, width, height]) {
    const wide = Math.min(Math.max(1, Math.round(width) || 1), this.width);
    const tall = Math.min(Math.max(1, Math.round(height) || 1), this.height);
    const left = Math.min(Math.max(0, Math.round(x) || 0), this.width - wide);
    return [left, Math.min(Math.max(0, Math.round(y) || 0), this.height - tall), wide, tall];
  }

  setBox(box) {
    this.box = this.inside(box);
    this.onbox();
    this.draw();
  }

  at(event) {
    const shown = this.canvas.getBoundingClientRect();
    return [((event.clientX - shown.left) / shown.width) * this.width, ((event.clientY - shown.top) / shown.height) * this.height];
  }

  listen() {
    let from = null;
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      from = this.at(event);
      if (this.mode === "Brush") this.stroke(from, from);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!from) return;
      const to = this.at(event);
      if (this.mode === "Brush") from = (this.stroke(from, to), to);
      else this.setBox([Math.min(from[0], to[0]), Math.min(from[1], to[1]), Math.abs(to[0] - from[0]), Math.abs(to[1] - from[1])]);
    });
    this.canvas.addEventListener("pointerup", () => (from = null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const step = steps[event.key];
    if (!step || this.mode !== "Box") return;
    event.preventDefault();
    const by = Math.max(1, Math.round(Math.max(this.width, this.height) / 100));
    const [x, y, width, height] = this.box;
    if (event.shiftKey) this.setBox([x, y, width + step[0] * by, height + step[1] * by]);
    else this.setBox([x + step[0] * by, y + step[1] * by, width, height]);
  }

  stroke(from, to) {
    const pen = this.paint.getContext("2d");
    const unit = Math.max(this.canvas.width, this.canvas.height) / 400;
    Object.assign(pen, { strokeStyle: COLOUR, lineWidth: this.brush * unit, lineCap: "round" });
    pen.beginPath();
    pen.moveTo(from[0] * this.scale, from[1] * this.scale);
    pen.lineTo(to[0] * this.scale + 0.01, to[1] * this.scale);
    pen.stroke();
    this.painted = true;
    this.draw();
  }

  clear() {
    this.paint.getContext("2d").clearRect(0, 0, this.paint.width, this.paint.height);
    this.painted = false;
    this.draw();
  }

  draw() {
    const pen = this.canvas.getContext("2d");
    pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (this.mode === "Brush") {
      pen.globalAlpha = 0.55;
      pen.drawImage(this.paint, 0, 0);
      pen.globalAlpha = 1;
      return;
    }
    const [x, y, width, height] = this.box.map((value) => value * this.scale);
    const unit = Math.max(this.canvas.width, this.canvas.height) / 250;
    for (const [colour, thick] of [["#000000", 3], [COLOUR, 1.5]]) {
      Object.assign(pen, { strokeStyle: colour, lineWidth: thick * unit });
      pen.strokeRect(x, y, width, height);
    }
  }

  result() {
    if (this.mode === "Box") return { box: this.box };
    return this.painted ? { mask: this.mask() } : null;
  }

  /** The brushed area as a PNG of the picture's size, white on black, base64. */
  mask() {
    const whole = h("canvas", { width: this.width, height: this.height });
    const pen = whole.getContext("2d");
    pen.drawImage(this.paint, 0, 0, this.width, this.height);
    const pixels = pen.getImageData(0, 0, this.width, this.height);
    for (let k = 0; k < pixels.data.length; k += 4) {
      const inside = pixels.data[k + 3] > 127 ? 255 : 0;
      pixels.data.set([inside, inside, inside, 255], k);
    }
    pen.putImageData(pixels, 0, 0);
    return whole.toDataURL("image/png").split(",")[1];
  }
}
