/** The token view: tokens of rows and of columns as buttons, with lines between those that attend to each other. */
import { type App, cellText, type Part } from "./app";
import { make, prepareCanvas } from "./dom";
import { cellName } from "./names";
import { css, inkOn } from "./palette";
import { colourOf, position } from "./raster";
import { largestColumns, largestRows, type Sheet } from "./sheet";

type Side = "rows" | "columns";

/** Tokens of a side at once; more are a window around the crosshair. */
const MOST = 400;
const LINES_PER_ROW = 3;
const LINES_OF_ONE = 32;
const LEAST = 0.02;
const CHIP = 30;
const BETWEEN = 160;
const BETWEEN_NARROW = 64;

/** One side's window: `[first, first + count)` of the shown cells. */
interface Window {
  first: number;
  count: number;
}

/** Two lists of tokens with lines between them. */
export class Tokens implements Part {
  readonly element: HTMLElement;
  readonly #note = make("p", { class: "muted" });
  readonly #canvas = make("canvas", { "aria-hidden": "true" });
  readonly #lists: Record<Side, HTMLElement>;
  readonly #titles = { rows: make("h3"), columns: make("h3") };
  readonly #head = make("div", { class: "token-titles" }, this.#titles.rows, this.#titles.columns);
  #key = "";
  #windows: Record<Side, Window> = { rows: { first: 0, count: 0 }, columns: { first: 0, count: 0 } };

  readonly #app: App;

  constructor(app: App) {
    this.#app = app;
    this.#lists = { rows: this.#makeList("rows"), columns: this.#makeList("columns") };
    const body = make("div", { class: "token-body" }, this.#lists.rows, this.#canvas, this.#lists.columns);
    this.element = make("div", { class: "tokens" }, this.#note, this.#head, body);
  }

  /** Follow the view. */
  render(): void {
    this.element.hidden = this.#app.view.tab !== "tokens";
    if (this.element.hidden) return;
    const { view, shown } = this.#app;
    const at = { rows: shown.row, columns: shown.column };
    const key = JSON.stringify([view.kind, view.layer, view.hiddenRows, view.hiddenColumns]);
    for (const side of ["rows", "columns"] as const) {
      const window = windowAround(this.#windows[side], at[side], shown[side].length, key === this.#key);
      if (key !== this.#key || window.first !== this.#windows[side].first) this.#fill(side, window);
    }
    this.#key = key;
    this.#titles.rows.textContent = shown.kind.rows.label;
    this.#titles.columns.textContent = shown.kind.columns.label;
    this.#note.textContent = this.#describe();
    this.#paint(at);
  }

  #makeList(side: Side): HTMLElement {
    const list = make("div", { class: "chips " + side, role: "group" });
    const choose = (event: Event) => {
      const chip = (event.target as Element).closest<HTMLElement>("[data-cell]");
      if (chip) this.#choose(side, Number(chip.dataset.cell));
    };
    for (const type of ["pointerover", "click", "focusin"]) list.addEventListener(type, choose);
    list.addEventListener("keydown", (event) => this.#press(side, event));
    return list;
  }

  #choose(side: Side, cell: number): void {
    const { view } = this.#app;
    if (view.side === side && cell === (side === "rows" ? view.row : view.column)) return;
    this.#app.update(side === "rows" ? { side, row: cell } : { side, column: cell });
  }

  #press(side: Side, event: KeyboardEvent): void {
    const steps: Record<string, number> = {
      ArrowUp: -1,
      ArrowDown: 1,
      Home: -Infinity,
      End: Infinity,
      PageUp: -10,
      PageDown: 10,
    };
    const other = event.key === "ArrowRight" ? "columns" : event.key === "ArrowLeft" ? "rows" : null;
    if (!(event.key in steps) && !other) return;
    event.preventDefault();
    const { shown } = this.#app;
    if (other) this.#app.update({ side: other });
    else {
      const cells = shown[side];
      const now = side === "rows" ? shown.row : shown.column;
      this.#choose(side, cells[Math.min(Math.max(now + steps[event.key], 0), cells.length - 1)]);
    }
    this.#app.flush();
    this.#lists[this.#app.view.side].querySelector<HTMLElement>('[tabindex="0"]')?.focus();
  }

  #fill(side: Side, window: Window): void {
    const { kind, layer, [side]: cells } = this.#app.shown;
    const axis = kind[side];
    const block = layer.block[side === "rows" ? 0 : 1];
    this.#windows[side] = window;
    const chips = Array.from(cells.subarray(window.first, window.first + window.count), (cell) => {
      const text = make("bdi", { dir: "auto" }, cellName(axis, cell, block, layer[side], 40));
      const title = cellText(this.#app, side, cell);
      const chip = make("button", { class: "chip", type: "button", "data-cell": cell, title }, text);
      if (axis.names?.[cell * block] === "") chip.ariaLabel = "∅ (empty)";
      return chip;
    });
    this.#lists[side].replaceChildren(...chips);
    this.#lists[side].setAttribute("aria-label", axis.label);
  }

  #describe(): string {
    const { view, shown } = this.#app;
    const about =
      view.side === "rows"
        ? `What row ${cellText(this.#app, "rows", view.row)} reads.`
        : `What reads column ${cellText(this.#app, "columns", view.column)}.`;
    const cut = Math.max(shown.rows.length, shown.columns.length) > MOST;
    return cut ? `${about} A window of ${MOST} tokens around the chosen one.` : about;
  }

  #paint(at: Record<Side, number>): void {
    const { view, scene } = this.#app;
    const [source] = this.#app.shown.sources;
    const sheet = scene.shown(view, source);
    const scale = scene.scale(view, source, sheet);
    const { rows, columns } = this.#windows;
    const height = Math.max(rows.count, columns.count) * CHIP;
    const width = this.element.clientWidth < 420 ? BETWEEN_NARROW : BETWEEN;
    this.#head.style.gap = width + "px";
    const context = prepareCanvas(this.#canvas, width, height);
    const line = (row: number, column: number, strong: boolean) => {
      const [from, to] = [row - rows.first, column - columns.first];
      if (from < 0 || to < 0 || from >= rows.count || to >= columns.count) return;
      const value = sheet.values[row * sheet.columns + column];
      if (value - value !== 0) return;
      const size = Math.abs(position(value, scale) - (scale.signed ? 0.5 : 0)) * (scale.signed ? 2 : 1);
      if (size < LEAST) return;
      context.strokeStyle = strong ? this.#app.theme.accent : this.#app.theme.muted;
      context.globalAlpha = strong ? 0.25 + 0.75 * size : 0.12 + 0.5 * size;
      context.lineWidth = 0.75 + (strong ? 4 : 2) * size;
      context.beginPath();
      context.moveTo(0, (from + 0.5) * CHIP);
      context.bezierCurveTo(width / 2, (from + 0.5) * CHIP, width / 2, (to + 0.5) * CHIP, width, (to + 0.5) * CHIP);
      context.stroke();
    };
    const signed = source === "difference" || scale.signed;
    for (let row = rows.first; row < rows.first + rows.count; row++) {
      for (const column of largestColumns(sheet, row, LINES_PER_ROW, signed)) line(row, column, false);
    }
    if (view.side === "rows")
      for (const c of largestColumns(sheet, at.rows, LINES_OF_ONE, signed)) line(at.rows, c, true);
    else for (const r of largestRows(sheet, at.columns, LINES_OF_ONE, signed)) line(r, at.columns, true);
    context.globalAlpha = 1;
    this.#shade(sheet, at, (i, parity) => colourOf(sheet, i, parity, scale, this.#app.theme.palette));
  }

  /** Colour the tokens of the other side by their weight, and mark the chosen one. */
  #shade(sheet: Sheet, at: Record<Side, number>, colour: (i: number, parity: number) => number): void {
    const { side } = this.#app.view;
    for (const list of ["rows", "columns"] as const) {
      const { first } = this.#windows[list];
      Array.from(this.#lists[list].children as HTMLCollectionOf<HTMLElement>).forEach((chip, k) => {
        const chosen = first + k === at[list];
        const i = list === "rows" ? (first + k) * sheet.columns + at.columns : at.rows * sheet.columns + first + k;
        const background = list === side ? null : colour(i, 0);
        chip.style.background = background === null ? "" : css(background);
        chip.style.color = background === null ? "" : inkOn(background);
        chip.classList.toggle("chosen", chosen && list === side);
        chip.setAttribute("aria-pressed", String(chosen && list === side));
        chip.tabIndex = chosen ? 0 : -1;
      });
    }
  }
}

function windowAround(old: Window, at: number, count: number, same: boolean): Window {
  if (count <= MOST) return { first: 0, count };
  if (same && at >= old.first && at < old.first + old.count) return old;
  return { first: Math.min(Math.max(at - MOST / 2, 0), count - MOST), count: MOST };
}
