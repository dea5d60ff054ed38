/** One head large: cells between two labelled axes, with a crosshair that follows pointer, touch and keys. */
import { type App, cellText, type Part } from "./app";
import { make, pixelRatio, prepareCanvas } from "./dom";
import { mapHit, mapLayout, type MapHit, type MapLayout } from "./layout";
import { tickName } from "./names";
import { type AxisLabels, measureLabels, paintMap, type Picture } from "./paint";
import { stepCell, toggleRange, type View } from "./state";

const PAGE = 10;

/** A large map of one run, or of the difference. Side by side, there are two. */
export class HeadMap implements Part {
  readonly element: HTMLElement;
  readonly box: HTMLElement;
  readonly #canvas = make("canvas", { tabindex: 0, role: "application" });
  readonly #spacer = make("div", { class: "spacer" }, this.#canvas);
  readonly #caption = make("p", { class: "caption" });
  #layout!: MapLayout;
  #labelsTurned = false;
  #followKeys = false;
  #tap = false;

  /** `index` is the number of the map among those side by side. */
  readonly #app: App;
  readonly #index: number;

  constructor(app: App, index: number) {
    this.#app = app;
    this.#index = index;
    this.box = make("div", { class: "scroll map-box", scroll: () => this.#draw() }, this.#spacer);
    this.element = make("div", { class: "map" }, this.#caption, this.box);
    this.#canvas.addEventListener("pointermove", (event) => this.#move(event));
    this.#canvas.addEventListener("pointerdown", (event) => (this.#tap = event.pointerType === "touch"));
    this.#canvas.addEventListener("click", (event) => this.#click(event));
    this.#canvas.addEventListener("keydown", (event) => this.#press(event));
  }

  /** Follow the view. */
  render(): void {
    const { view, shown, data } = this.#app;
    const source = shown.sources[this.#index];
    this.element.hidden = !source;
    if (!source) return;
    const { runs } = data.payload;
    this.#caption.hidden = runs.length < 2;
    const run = runs[source === "first" ? 0 : 1];
    this.#caption.textContent = source === "difference" ? `${runs[1]} − ${runs[0]}` : run;
    const room = this.#room();
    const labels = this.#labels();
    const context = this.#canvas.getContext("2d")!;
    const rows = { count: shown.rows.length, name: labels.row };
    const columns = { count: shown.columns.length, name: labels.column };
    const measured = measureLabels(context, rows, columns, room);
    this.#labelsTurned = measured.turned;
    this.#layout = mapLayout(rows.count, columns.count, room, measured, view.zoom, pixelRatio());
    this.#spacer.style.width = this.#layout.width + "px";
    this.#spacer.style.height = this.#layout.height + "px";
    this.box.style.maxHeight = room.height + "px";
    if (this.#followKeys) this.#reveal();
    this.#followKeys = false;
    this.#draw();
    this.#canvas.setAttribute("aria-label", this.#describe());
  }

  /** Return the rectangle in the window of a cell, given the numbers of its stored row and column. */
  cellRect(row: number, column: number): DOMRect {
    const { shown } = this.#app;
    const { left, top, cellWidth, cellHeight } = this.#layout;
    const canvas = this.#canvas.getBoundingClientRect();
    const x = canvas.x + left + shown.columns.indexOf(column) * cellWidth - this.box.scrollLeft;
    const y = canvas.y + top + shown.rows.indexOf(row) * cellHeight - this.box.scrollTop;
    return new DOMRect(x, y, cellWidth, cellHeight);
  }

  /** Return what is painted, without a part being scrolled away: for a saved picture. */
  wholePicture(): Picture {
    const layout = this.#layout;
    return {
      ...this.#picture(),
      cross: null,
      scroll: { x: 0, y: 0 },
      room: { width: layout.width, height: layout.height },
    };
  }

  #room(): { width: number; height: number } {
    const height = Math.min(Math.max(window.innerHeight * 0.75, 260), 1000);
    return { width: this.box.clientWidth, height: Math.floor(height) };
  }

  #labels(): AxisLabels {
    const { kind, layer, rows, columns } = this.#app.shown;
    return {
      row: (i) => tickName(kind.rows, rows[i], layer.block[0], layer.rows),
      column: (i) => tickName(kind.columns, columns[i], layer.block[1], layer.columns),
      rows: kind.rows.label,
      columns: kind.columns.label,
      turned: this.#labelsTurned,
    };
  }

  #picture(): Picture {
    const { view, shown, scene, theme } = this.#app;
    const source = shown.sources[this.#index];
    const sheet = scene.shown(view, source);
    return {
      sheet,
      scale: scene.scale(view, source, sheet),
      theme,
      layout: this.#layout,
      labels: this.#labels(),
      scroll: { x: this.box.scrollLeft, y: this.box.scrollTop },
      room: {
        width: Math.min(this.box.clientWidth, this.#layout.width),
        height: Math.min(this.box.clientHeight, this.#layout.height),
      },
      cross: { row: shown.row, column: shown.column, pinned: view.pinned },
      ratio: pixelRatio(),
    };
  }

  #draw(): void {
    if (!this.#layout) return;
    const picture = this.#picture();
    paintMap(prepareCanvas(this.#canvas, picture.room.width, picture.room.height), picture);
  }

  /** Scroll so that the crosshair is in view. */
  #reveal(): void {
    const box = this.box;
    const layout = this.#layout;
    const x = this.#app.shown.column * layout.cellWidth;
    const y = this.#app.shown.row * layout.cellHeight;
    const room = { width: box.clientWidth - layout.left, height: box.clientHeight - layout.top };
    if (x < box.scrollLeft) box.scrollLeft = x;
    if (y < box.scrollTop) box.scrollTop = y;
    if (x + layout.cellWidth > box.scrollLeft + room.width) box.scrollLeft = x + layout.cellWidth - room.width + 4;
    if (y + layout.cellHeight > box.scrollTop + room.height) box.scrollTop = y + layout.cellHeight - room.height + 4;
  }

  #hit(event: MouseEvent): MapHit | null {
    const scroll = { x: this.box.scrollLeft, y: this.box.scrollTop };
    const found = mapHit(this.#layout, event.offsetX, event.offsetY, scroll);
    if (!found) return null;
    const { rows, columns } = this.#app.shown;
    return {
      row: found.row === null ? null : rows[found.row],
      column: found.column === null ? null : columns[found.column],
    };
  }

  #move(event: PointerEvent): void {
    const found = this.#hit(event);
    this.#canvas.style.cursor = found && (found.row === null || found.column === null) ? "pointer" : "crosshair";
    this.#canvas.title = found ? this.#hint(found) : "";
    if (event.pointerType !== "touch" && found) this.#point(found, this.#app.view.pinned);
  }

  /** Move the crosshair; a pinned row stays. */
  #point({ row, column }: MapHit, keepRow: boolean): void {
    const { view } = this.#app;
    const change = { row: row === null || keepRow ? view.row : row, column: column ?? view.column };
    if (change.row !== view.row || change.column !== view.column) this.#app.update(change);
  }

  #click(event: MouseEvent): void {
    const found = this.#hit(event);
    if (!found) return;
    if (found.row === null || found.column === null) this.#hide(found);
    else if (this.#tap) this.#point(found, false);
    else this.#app.update({ ...(found as { row: number; column: number }), pinned: !this.#isPinned(found.row) });
  }

  #isPinned(row: number): boolean {
    return this.#app.view.pinned && this.#app.view.row === row;
  }

  /** Hide a row or a column, whichever is given. */
  #hide({ row, column }: MapHit): void {
    this.#app.update(hideChange(this.#app, row, row === null ? column : null));
  }

  #hint({ row, column }: MapHit): string {
    if (row === null) return `Hide column ${cellText(this.#app, "columns", column!)}`;
    return column === null ? `Hide row ${cellText(this.#app, "rows", row)}` : "";
  }

  #press(event: KeyboardEvent): void {
    if (event.altKey || event.metaKey) return;
    const change = keyChange(this.#app, event.key, event.ctrlKey);
    if (!change) return;
    event.preventDefault();
    this.#followKeys = true;
    this.#app.update(change);
  }

  #describe(): string {
    const { kind } = this.#app.shown;
    const { rows, columns } = this.#layout;
    return `Map of ${rows} rows (${kind.rows.label}) by ${columns} columns (${kind.columns.label}); arrow keys move`;
  }
}

/** Return the change of the view that a key asks for; null if the key has no meaning. */
export function keyChange(app: App, key: string, control = false): Partial<View> | null {
  const { view, shown } = app;
  const row = (step: number) => ({ row: stepCell(shown.rows, view.row, step) });
  const column = (step: number) => ({ column: stepCell(shown.columns, view.column, step) });
  if (control) return key === "Home" ? row(-Infinity) : key === "End" ? row(Infinity) : null;
  switch (key) {
    case "ArrowUp":
      return row(-1);
    case "ArrowDown":
      return row(1);
    case "PageUp":
      return row(-PAGE);
    case "PageDown":
      return row(PAGE);
    case "ArrowLeft":
      return column(-1);
    case "ArrowRight":
      return column(1);
    case "Home":
      return column(-Infinity);
    case "End":
      return column(Infinity);
    case "Enter":
    case " ":
      return { pinned: !view.pinned };
    case "+":
    case "=":
      return { zoom: Math.min(view.zoom + 1, 20) };
    case "-":
      return { zoom: Math.max(view.zoom - 1, 0) };
    case "0":
      return { zoom: 0 };
    case "h":
      return hideChange(app, null, view.column);
    case "H":
      return hideChange(app, view.row, null);
    default:
      return null;
  }
}

/** Return the change that hides a stored row or column, or shows it again. */
export function hideChange({ view, shown }: App, row: number | null, column: number | null): Partial<View> {
  const { block, rows, columns } = shown.layer;
  const toggled = (texts: string[], cell: number | null, size: number, of: number) =>
    cell === null
      ? texts
      : texts.map((text, i) => (i === view.kind ? toggleRange(text, cell * size, cell * size + size - 1, of) : text));
  return {
    hiddenRows: toggled(view.hiddenRows, row, block[0], rows),
    hiddenColumns: toggled(view.hiddenColumns, column, block[1], columns),
  };
}
