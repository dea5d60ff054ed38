/** The overview: one thumbnail per head on one canvas that draws only what is in view. */
import type { App, Part, Theme } from "./app";
import { FONT, make, makeSelect, pixelRatio, prepareCanvas, setOptions } from "./dom";
import { type GridLayout, gridLayout, gridStep, labelStep, type Rect } from "./layout";
import { formatNumber } from "./names";
import { thumbnail } from "./raster";
import {
  groupOf,
  type HeadPlace,
  mappingOf,
  measureOf,
  orderedHeads,
  orderMeasure,
  orders,
  rangeOf,
  type View,
} from "./state";

/** Milliseconds of a frame that making thumbnails may take. */
const BUDGET = 10;
const CACHED_PIXELS = 3e7;

/** Overview of the heads of a kind. */
export class Grid implements Part {
  readonly element: HTMLElement;
  readonly #canvas = make("canvas", { tabindex: 0, role: "application" });
  readonly #spacer = make("div", { class: "spacer" }, this.#canvas);
  readonly #box = make("div", { class: "scroll grid-box", scroll: () => this.#draw() }, this.#spacer);
  readonly #tip = make("p", { class: "readout" });
  readonly #order: HTMLSelectElement;
  readonly #orderField: HTMLElement;
  #layout!: GridLayout;
  #key = "";
  #imagesKey = "";
  #width = 0;
  #hovered = -1;
  #pending = 0;
  readonly #images = new Map<number, ImageData[]>();

  readonly #app: App;

  constructor(app: App) {
    this.#app = app;
    [this.#orderField, this.#order] = makeSelect("Sort by", (order) => app.update({ order }));
    const heading = make("div", { class: "heading" }, make("h2", {}, "Heads"), this.#orderField);
    this.element = make(
      "section",
      { class: "overview", "aria-label": "Overview of heads" },
      heading,
      this.#box,
      this.#tip,
    );
    this.#canvas.addEventListener("pointermove", (event) => this.#hover(this.#find(event)));
    this.#canvas.addEventListener("pointerleave", () => this.#hover(-1));
    this.#canvas.addEventListener("click", (event) => this.#choose(this.#find(event)));
    this.#canvas.addEventListener("keydown", (event) => this.#press(event));
  }

  /** Follow the view; thumbnails are made again only if something changed how they look. */
  render(): void {
    const { view, data } = this.#app;
    const { kind } = this.#app.shown;
    this.element.hidden = kind.layers.length === 1 && kind.layers[0].heads === 1;
    if (this.element.hidden) return;
    this.#setOrders(view);
    const width = this.#box.clientWidth;
    const imagesKey = JSON.stringify([
      view.kind,
      view.frame,
      view.compare,
      rangeOf(view, data.payload),
      mappingOf(view, data.payload),
      view.hiddenRows,
      view.hiddenColumns,
      view.renormalise,
      this.#app.theme.dark,
      width,
      pixelRatio(),
    ]);
    const key = JSON.stringify([imagesKey, data.complete, view.order, view.layer, view.head, view.show]);
    if (key === this.#key) return;
    this.#key = key;
    if (imagesKey !== this.#imagesKey) this.#images.clear();
    this.#imagesKey = imagesKey;
    this.#width = width;
    this.#arrange();
    this.#reveal();
    this.#draw();
    this.#tell();
  }

  /** Return the rectangle of a head's thumbnail in the window. */
  headRect(place: HeadPlace): DOMRect {
    const i = this.#layout.heads.findIndex((head) => head.layer === place.layer && head.head === place.head);
    const rect = this.#layout.rect(i);
    const box = this.#canvas.getBoundingClientRect();
    return new DOMRect(
      box.x + rect.x - this.#box.scrollLeft,
      box.y + rect.y - this.#box.scrollTop,
      rect.width,
      rect.height,
    );
  }

  #setOrders(view: View): void {
    const { payload } = this.#app.data;
    const options = orders(view, payload).map((order): [string, string] => {
      if (order === "place") return [order, "layer and head"];
      const { name } = payload.measures[Number.parseInt(order, 10)];
      return [order, `${name}, ${order.endsWith("down") ? "highest" : "lowest"} first`];
    });
    setOptions(this.#order, options, view.order);
    this.#orderField.hidden = options.length === 1;
    const measure = orderMeasure(view);
    this.#order.title = measure === null ? "" : payload.measures[measure].help;
  }

  #arrange(): void {
    const { view, data } = this.#app;
    const { kind, sources } = this.#app.shown;
    const [rows, columns] = kind.layers[0].shape;
    const pair = sources.length;
    const heads = orderedHeads(view, data.payload);
    const context = this.#canvas.getContext("2d")!;
    context.font = FONT;
    const left = Math.min(Math.max(...kind.layers.map((layer) => context.measureText(layer.name).width)), 90) + 10;
    const flow = view.order !== "place";
    this.#layout = gridLayout(
      { kind, heads, aspect: rows / columns / pair, flow, width: this.#width },
      Math.ceil(left),
    );
    this.#spacer.style.width = this.#layout.width + "px";
    this.#spacer.style.height = this.#layout.height + "px";
  }

  /** Scroll so that the chosen thumbnail is in view. */
  #reveal(): void {
    const rect = this.#layout.rect(this.#chosen());
    const box = this.#box;
    const { left, top } = this.#layout;
    if (rect.x < box.scrollLeft + left) box.scrollLeft = rect.x - left;
    if (rect.y < box.scrollTop + top) box.scrollTop = rect.y - top;
    if (rect.x + rect.width > box.scrollLeft + box.clientWidth)
      box.scrollLeft = rect.x + rect.width - box.clientWidth + 8;
    if (rect.y + rect.height > box.scrollTop + box.clientHeight) {
      box.scrollTop = rect.y + rect.height - box.clientHeight + 8;
    }
  }

  #chosen(): number {
    const { layer, head } = this.#app.view;
    return this.#layout.heads.findIndex((place) => place.layer === layer && place.head === head);
  }

  #draw(): void {
    cancelAnimationFrame(this.#pending);
    const box = this.#box;
    const layout = this.#layout;
    const width = Math.min(box.clientWidth, layout.width);
    const height = Math.min(box.clientHeight, layout.height);
    const context = prepareCanvas(this.#canvas, width, height);
    const missing: number[] = [];
    layout.heads.forEach((_, i) => {
      const rect = this.#onCanvas(layout.rect(i));
      if (rect.x > width || rect.y > height || rect.x + rect.width < 0 || rect.y + rect.height < 0) return;
      const images = this.#images.get(this.#number(i));
      if (images) this.#put(context, rect, images);
      else missing.push(i);
    });
    this.#drawFrames(context, width, height);
    // Most sheets arrive after the first picture.
    if (missing.length && this.#app.data.complete) this.#pending = requestAnimationFrame(() => this.#makeSome(missing));
  }

  /** Make thumbnails until the time of this frame is used up, then draw them and go on in the next. */
  #makeSome(missing: number[]): void {
    const end = performance.now() + BUDGET;
    const { width, height } = this.#layout.thumb;
    if (this.#images.size * width * height * pixelRatio() ** 2 > CACHED_PIXELS) this.#images.clear();
    for (const i of missing) {
      this.#images.set(this.#number(i), this.#makeImages(this.#layout.heads[i]));
      if (performance.now() > end) break;
    }
    this.#draw();
  }

  #makeImages(place: HeadPlace): ImageData[] {
    const { scene, view, theme } = this.#app;
    const { sources } = this.#app.shown;
    const ratio = pixelRatio();
    const width = Math.max(
      1,
      Math.floor((this.#layout.thumb.width * ratio - (sources.length - 1) * ratio) / sources.length),
    );
    const height = Math.max(1, Math.round(this.#layout.thumb.height * ratio));
    return sources.map((source) => {
      const sheet = scene.head(view, source, place);
      const pixels = thumbnail(sheet, width, height, scene.scale(view, source, sheet), theme.palette);
      return new ImageData(pixels, width, height);
    });
  }

  #put(context: CanvasRenderingContext2D, rect: Rect, images: ImageData[]): void {
    const ratio = pixelRatio();
    images.forEach((image, i) => {
      const x = Math.round(rect.x * ratio) + i * (image.width + Math.ceil(ratio));
      context.putImageData(image, x, Math.round(rect.y * ratio));
    });
  }

  #drawFrames(context: CanvasRenderingContext2D, width: number, height: number): void {
    const { theme, view } = this.#app;
    const layout = this.#layout;
    context.font = FONT;
    context.textBaseline = "middle";
    layout.heads.forEach((place, i) => {
      const rect = this.#onCanvas(layout.rect(i));
      if (rect.x > width || rect.y > height || rect.x + rect.width < 0 || rect.y + rect.height < 0) return;
      const chosen = place.layer === view.layer && (place.head === view.head || view.show !== "head");
      context.strokeStyle = chosen || i === this.#hovered ? theme.accent : theme.line;
      context.lineWidth = chosen ? 2 : 1;
      const out = context.lineWidth / 2;
      context.strokeRect(rect.x - out, rect.y - out, rect.width + 2 * out, rect.height + 2 * out);
      if (view.order !== "place") this.#drawFlowLabel(context, rect, place);
    });
    if (view.order === "place") this.#drawHeaders(context, theme, width, height);
  }

  #drawFlowLabel(context: CanvasRenderingContext2D, rect: Rect, place: HeadPlace): void {
    const { view, data, theme } = this.#app;
    const value = measureOf(view, data.payload, orderMeasure(view)!, place);
    context.textAlign = "left";
    context.fillStyle = theme.ink;
    context.fillText(`${place.layer}.${place.head}`, rect.x, rect.y + rect.height + 11);
    context.fillStyle = theme.muted;
    context.fillText(value === null ? "–" : formatNumber(value), rect.x, rect.y + rect.height + 25);
  }

  #drawHeaders(context: CanvasRenderingContext2D, theme: Theme, width: number, height: number): void {
    const { kind } = this.#app.shown;
    const box = this.#box;
    const layout = this.#layout;
    const { thumb } = layout;
    context.fillStyle = theme.surface;
    context.fillRect(0, 0, width, layout.top - 3);
    context.fillStyle = theme.ink;
    context.textAlign = "center";
    const widest = kind.layers.reduce((best, layer, i) => (layer.heads > kind.layers[best].heads ? i : best), 0);
    const before = kind.layers.slice(0, widest).reduce((sum, layer) => sum + layer.heads, 0);
    const step = labelStep(thumb.width + 4, 20);
    for (let head = 0; head < kind.layers[widest].heads; head += step) {
      const x = layout.rect(before + head).x - box.scrollLeft + thumb.width / 2;
      context.fillText(String(head), x, layout.top - 12);
    }
    this.#drawGroups(context, theme, widest, before);
    context.fillStyle = theme.surface;
    context.fillRect(0, 0, layout.left - 3, height);
    context.fillStyle = theme.ink;
    context.textAlign = "left";
    const rowStep = labelStep(thumb.height + 4, 15);
    for (let layer = 0; layer < kind.layers.length; layer += rowStep) {
      const y = layout.top + layer * (thumb.height + 4) + thumb.height / 2 - box.scrollTop;
      if (y > layout.top) context.fillText(kind.layers[layer].name, 2, y, layout.left - 8);
    }
    context.fillStyle = theme.muted;
    context.fillText("head", 2, layout.top - 12, layout.left - 6);
  }

  /** Draw a bracket over the heads that share keys and values. */
  #drawGroups(context: CanvasRenderingContext2D, theme: Theme, layer: number, before: number): void {
    const { kind } = this.#app.shown;
    const size = groupOf(kind, layer, 0)?.size;
    if (!size) return;
    context.strokeStyle = theme.muted;
    context.fillStyle = theme.muted;
    context.lineWidth = 1;
    for (let group = 0; group < kind.groups!; group++) {
      const first = this.#onCanvas(this.#layout.rect(before + group * size));
      const last = this.#onCanvas(this.#layout.rect(before + (group + 1) * size - 1));
      const right = last.x + last.width;
      context.beginPath();
      context.moveTo(first.x + 0.5, 20);
      context.lineTo(first.x + 0.5, 16.5);
      context.lineTo(right - 0.5, 16.5);
      context.lineTo(right - 0.5, 20);
      context.stroke();
      context.fillText(`kv ${group}`, (first.x + right) / 2, 8, right - first.x);
    }
  }

  #onCanvas(rect: Rect): Rect {
    return { ...rect, x: rect.x - this.#box.scrollLeft, y: rect.y - this.#box.scrollTop };
  }

  /** Number of the i-th thumbnail's head that stays when the order changes. */
  #number(i: number): number {
    const { layer, head } = this.#layout.heads[i];
    return layer * 65536 + head;
  }

  #find(event: PointerEvent | MouseEvent): number {
    const x = event.offsetX;
    const y = event.offsetY;
    if (x < this.#layout.left || y < this.#layout.top) return -1;
    return this.#layout.at(x + this.#box.scrollLeft, y + this.#box.scrollTop);
  }

  #hover(i: number): void {
    if (i === this.#hovered) return;
    this.#hovered = i;
    this.#canvas.style.cursor = i < 0 ? "default" : "pointer";
    this.#draw();
    this.#tell();
  }

  #choose(i: number): void {
    if (i >= 0) this.#app.update({ ...this.#layout.heads[i], show: "head" });
  }

  #press(event: KeyboardEvent): void {
    const keys = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"];
    if (event.key === "Enter") this.#choose(this.#chosen());
    else if (keys.includes(event.key)) this.#choose(gridStep(this.#layout, this.#chosen(), event.key));
    else return;
    event.preventDefault();
  }

  /** Say what is known of the head under the pointer, or of the chosen one. */
  #tell(): void {
    const place = this.#layout.heads[this.#hovered] ?? this.#layout.heads[this.#chosen()];
    const { view, data } = this.#app;
    const facts = data.payload.measures.flatMap((measure, i) => {
      const value = measureOf(view, data.payload, i, place);
      return value === null ? [] : [`${measure.name} ${formatNumber(value)} ${measure.unit}`.trim()];
    });
    const where = `${this.#app.shown.kind.layers[place.layer].name}, head ${place.head}`;
    this.#tip.textContent = facts.length ? `${where}: ${facts.join(", ")}` : where;
    this.#canvas.setAttribute("aria-label", `Heads by layer; arrow keys choose one. Now ${this.#tip.textContent}`);
  }
}
