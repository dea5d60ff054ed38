/** The crosshair's cell in words, the hidden mass, and the crosshair's row as a table. */
import { type App, cellText, type Part } from "./app";
import { debounce, make } from "./dom";
import { cellName, describeCell, formatNumber } from "./names";
import { placeOf } from "./scene";
import { largestColumns, MASKED, type Sheet } from "./sheet";

const IN_TABLE = 16;
const PAUSE = 400;

/** Text under the map. */
export class Readout implements Part {
  readonly element: HTMLElement;
  readonly #line = make("p", { class: "readout" });
  readonly #exact = make("p", { class: "readout muted" });
  readonly #mass = make("p", { class: "readout muted" });
  // Screen readers get the text when the crosshair rests, not at each step.
  readonly #live = make("p", { class: "unseen", "aria-live": "polite" });
  readonly #speak = debounce(() => (this.#live.textContent = this.#line.textContent), PAUSE);
  readonly #body = make("tbody");
  readonly #head = make("tr");
  readonly #caption = make("caption");
  readonly #details: HTMLDetailsElement;

  readonly #app: App;

  constructor(app: App) {
    this.#app = app;
    const table = make("table", {}, this.#caption, make("thead", {}, this.#head), this.#body);
    this.#details = make("details", { toggle: () => this.#fillTable() }, make("summary", {}, "Row as a table"), table);
    this.element = make("div", {}, this.#line, this.#exact, this.#mass, this.#live, this.#details);
  }

  /** Follow the view. */
  render(): void {
    this.#line.textContent = describeCross(this.#app);
    this.#exact.textContent = this.#describeExact();
    this.#mass.textContent = this.#describeMass();
    for (const part of [this.#exact, this.#mass]) part.hidden = part.textContent === "";
    this.#speak();
    this.#fillTable();
  }

  /** Name the exact largest weight of the crosshair's rows, which pooling blurs. */
  #describeExact(): string {
    const { view, shown, data } = this.#app;
    if (view.show !== "head") return "";
    const { kind, layer } = shown;
    const first = view.row * layer.block[0];
    const texts = shown.sources.flatMap((source) => {
      if (source === "difference") return [];
      const place = placeOf(view, source === "first" ? 0 : 1, view);
      const [top] = data.largest(place, first, first + layer.block[0]);
      if (!top) return [];
      const row = describeCell(kind.rows, top.row, 1, layer.rows);
      return [
        `row ${row} → column ${describeCell(kind.columns, top.column, 1, layer.columns)}: ${formatNumber(top.value)}`,
      ];
    });
    return texts.length ? `Exact largest: ${texts.join("; ")}` : "";
  }

  #describeMass(): string {
    const { view, shown, scene, data } = this.#app;
    const runs = new Set(shown.sources.flatMap((source) => (source === "difference" ? [0, 1] : [source === "first" ? 0 : 1])));
    const texts = [...runs].flatMap((run) => {
      const masses = scene.hidden(view, run);
      if (!masses) return [];
      const mean = masses.reduce((sum, mass) => sum + mass, 0) / masses.length;
      const name = runs.size > 1 ? `${data.payload.runs[run]} ` : "";
      return [`${name}${formatNumber(masses[shown.row])} of this row, ${formatNumber(mean)} on average over rows`];
    });
    return texts.length ? `Hidden mass: ${texts.join("; ")}` : "";
  }

  #fillTable(): void {
    if (!this.#details.open) return;
    const { view, data, scene } = this.#app;
    const { kind, layer, row, columns, sources } = this.#app.shown;
    const sheets = sources.map((source) => scene.shown(view, source));
    const { runs } = data.payload;
    const names = sources.map((s) =>
      s === "difference" ? "difference" : runs.length < 2 ? "value" : runs[s === "first" ? 0 : 1],
    );
    this.#caption.textContent =
      `Row ${cellText(this.#app, "rows", view.row)}: ` + `its ${Math.min(IN_TABLE, columns.length)} largest columns`;
    this.#head.replaceChildren(...["column", "name", ...names].map((text) => make("th", { scope: "col" }, text)));
    const lines = largestColumns(sheets[0], row, IN_TABLE, sources[0] === "difference").map((column) => {
      const stored = columns[column];
      const number = describeCell({ label: "", names: null }, stored, layer.block[1], layer.columns);
      const name = kind.columns.names ? cellName(kind.columns, stored, layer.block[1], layer.columns, 60) : "";
      const values = sheets.map((sheet) => make("td", {}, describeValue(sheet, row, column)));
      return make("tr", {}, make("td", {}, number), make("td", {}, make("bdi", {}, name)), ...values);
    });
    this.#body.replaceChildren(...lines);
  }
}

/** Say what the crosshair points at: "row 3 'cat' → column 5 'sat': 0.4213". */
export function describeCross(app: App): string {
  const { view, shown, data, scene } = app;
  const { layer, sources } = shown;
  const about = data.payload.encoding === "levels" ? "≈ " : "";
  const values = sources.map((source) => {
    const value = about + describeValue(scene.shown(view, source), shown.row, shown.column);
    return sources.length > 1 ? `${data.payload.runs[source === "first" ? 0 : 1]} ${value}` : value;
  });
  const pooled = layer.reduce === "none" ? "" : ` (block of ${layer.block.join(" × ")}, ${layer.reduce})`;
  const [row, column] = [cellText(app, "rows", view.row), cellText(app, "columns", view.column)];
  return `row ${row} → column ${column}: ${values.join(", ")}${pooled}${view.pinned ? " · row pinned" : ""}`;
}

/** Return the number of a cell, or "masked". */
export function describeValue(sheet: Sheet, row: number, column: number): string {
  const i = row * sheet.columns + column;
  return sheet.bits[i] === MASKED ? "masked" : formatNumber(sheet.values[i]);
}
