/** The picture view: an image whose patches are columns, covered by the weights of the crosshair's row. */
import { type App, cellText, type Part } from "./app";
import { make, prepareCanvas } from "./dom";
import { css } from "./palette";
import { colourOf } from "./raster";
import { keyChange } from "./map";

const WIDEST = 560;

/** The image with one row of weights over its patches. */
export class PictureView implements Part {
  readonly element: HTMLElement;
  readonly #canvas = make("canvas", { tabindex: 0, role: "application" });
  readonly #box = make("div", { class: "picture-box" }, this.#canvas);
  readonly #row = make("input", { type: "range", min: 0, input: () => this.#chooseRow() });
  readonly #rowText = make("span");
  readonly #opacity = make("input", { type: "range", min: 0, max: 1, step: 0.05 });
  #image: HTMLImageElement | null = null;
  #size = { width: 0, height: 0 };

  readonly #app: App;

  constructor(app: App) {
    this.#app = app;
    this.#opacity.addEventListener("input", () => app.update({ opacity: Number(this.#opacity.value) }));
    const rowField = make("label", { class: "field wide" }, make("span", {}, "Row"), this.#row, this.#rowText);
    const opacityField = make("label", { class: "field" }, make("span", {}, "Overlay"), this.#opacity);
    this.element = make(
      "div",
      { class: "picture" },
      make("div", { class: "toolbar" }, rowField, opacityField),
      this.#box,
    );
    this.#canvas.addEventListener("pointermove", (event) => event.pointerType !== "touch" && this.#point(event, false));
    this.#canvas.addEventListener("click", (event) => this.#point(event, true));
    this.#canvas.addEventListener("keydown", (event) => this.#press(event));
  }

  /** Follow the view. */
  render(): void {
    const { view, shown } = this.#app;
    const { picture } = shown.kind;
    this.element.hidden = view.tab !== "picture" || !picture;
    if (this.element.hidden || !picture) return;
    if (this.#image?.src !== picture.url) this.#load(picture.url);
    this.#row.max = String(shown.rows.length - 1);
    this.#row.value = String(shown.row);
    this.#rowText.textContent = cellText(this.#app, "rows", view.row);
    this.#row.setAttribute("aria-valuetext", this.#rowText.textContent);
    this.#opacity.value = String(view.opacity);
    this.#draw();
    this.#canvas.setAttribute(
      "aria-label",
      `Weights of row ${this.#rowText.textContent} over the picture; arrow keys move`,
    );
  }

  #load(url: string): void {
    this.#image = new Image();
    this.#image.addEventListener("load", () => this.#draw());
    this.#image.src = url;
  }

  #chooseRow(): void {
    this.#app.update({ row: this.#app.shown.rows[Number(this.#row.value)] });
  }

  #draw(): void {
    const { view, scene, theme } = this.#app;
    const { kind, layer, row, columns, sources } = this.#app.shown;
    const { picture } = kind;
    const { block } = layer;
    if (!picture) return;
    const width = Math.min(this.#box.clientWidth, WIDEST, (window.innerHeight * 0.7 * picture.width) / picture.height);
    this.#size = { width, height: (width * picture.height) / picture.width };
    const context = prepareCanvas(this.#canvas, this.#size.width, this.#size.height);
    context.imageSmoothingEnabled = picture.width > width;
    if (this.#image?.complete && this.#image.naturalWidth) {
      context.filter = "grayscale(1)"; // so that all colour is that of weights
      context.drawImage(this.#image, 0, 0, width, this.#size.height);
      context.filter = "none";
    }
    const sheet = scene.shown(view, sources[0]);
    const scale = scene.shownScale(view, sources);
    context.globalAlpha = view.opacity;
    for (let patch = 0; patch < picture.grid[0] * picture.grid[1]; patch++) {
      const column = columns.indexOf(Math.floor((picture.first + patch) / block[1]));
      if (column < 0) continue;
      context.fillStyle = css(colourOf(sheet, row * sheet.columns + column, patch, scale, theme.palette));
      context.fillRect(...this.#patchRect(patch, picture.grid));
    }
    context.globalAlpha = 1;
    context.strokeStyle = theme.accent;
    context.lineWidth = 2;
    context.strokeRect(...this.#patchRect(view.column * block[1] - picture.first, picture.grid));
  }

  #patchRect(patch: number, [rows, columns]: [number, number]): [number, number, number, number] {
    const [width, height] = [this.#size.width / columns, this.#size.height / rows];
    return patch < 0 ? [0, 0, 0, 0] : [(patch % columns) * width, Math.floor(patch / columns) * height, width, height];
  }

  #point(event: MouseEvent, chooseRow: boolean): void {
    const { view, shown } = this.#app;
    const picture = shown.kind.picture!;
    const [rows, columns] = picture.grid;
    const x = Math.min(Math.floor((event.offsetX / this.#size.width) * columns), columns - 1);
    const y = Math.min(Math.floor((event.offsetY / this.#size.height) * rows), rows - 1);
    const position = picture.first + Math.max(y, 0) * columns + Math.max(x, 0);
    const { block } = shown.layer;
    const column = Math.floor(position / block[1]);
    if (chooseRow && picture.rows_too) this.#app.update({ column, row: Math.floor(position / block[0]) });
    else if (column !== view.column) this.#app.update({ column });
  }

  /** Arrow keys move over the patches; page keys change the row. */
  #press(event: KeyboardEvent): void {
    const { view, shown } = this.#app;
    const { first, grid } = shown.kind.picture!;
    const steps: Record<string, number> = { ArrowUp: -grid[1], ArrowDown: grid[1] };
    const column = view.column + (steps[event.key] ?? 0);
    const isPatch = column >= first && column < first + grid[0] * grid[1];
    const change = steps[event.key] ? { column: isPatch ? column : view.column } : keyChange(this.#app, event.key);
    if (!change || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.#app.update(change);
  }
}
