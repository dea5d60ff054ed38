/** Everything that changes the view and is not a picture: tabs, slider, toolbar, hidden rows and columns. */
import type { App, Part } from "./app";
import { make, makeSelect, setOptions } from "./dom";
import { hideChange } from "./map";
import {
  type Comparison,
  hasMass,
  mappingOf,
  RANGES,
  type RangeOf,
  rangeOf,
  type Show,
  shows,
  type View,
} from "./state";
import type { Mapping } from "./raster";

const SHOW_TEXT: Record<Show, string> = {
  head: "one head",
  mean: "mean of heads",
  max: "maximum of heads",
  rollout: "rollout",
};
const MAPPING_TEXT: Record<Mapping, string> = { linear: "linear", root: "square root", log: "logarithm" };

/** A tab per kind; absent with one kind. */
export class KindTabs implements Part {
  readonly element = make("div", { role: "tablist", class: "tabs", "aria-label": "Kind of attention" });
  readonly #tabs: HTMLButtonElement[];

  readonly #app: App;

  constructor(app: App) {
    this.#app = app;
    this.#tabs = app.data.payload.kinds.map(({ title }, kind) =>
      make(
        "button",
        {
          type: "button",
          role: "tab",
          id: `attn-tab-${kind}`,
          "aria-controls": "attn-panel",
          click: () => app.update({ kind }),
          keydown: (event: KeyboardEvent) => this.#press(event),
        },
        title,
      ),
    );
    this.element.append(...this.#tabs);
    this.element.hidden = this.#tabs.length === 1;
  }

  /** Follow the view. */
  render(): void {
    this.#tabs.forEach((tab, kind) => {
      const chosen = kind === this.#app.view.kind;
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
    });
  }

  #press(event: KeyboardEvent): void {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const kind = (this.#app.view.kind + step + this.#tabs.length) % this.#tabs.length;
    this.#app.update({ kind });
    this.#tabs[kind].focus();
  }
}

/** The slider through frames; absent with one frame. */
export class FrameSlider implements Part {
  readonly element: HTMLElement;
  readonly #slider: HTMLInputElement;
  readonly #text = make("output");

  readonly #app: App;

  constructor(app: App) {
    this.#app = app;
    const { frames } = app.data.payload;
    this.#slider = make("input", {
      type: "range",
      min: 0,
      max: frames.length - 1,
      step: 1,
      "aria-label": "Frame",
      input: () => app.update({ frame: Number(this.#slider.value) }),
    });
    this.element = make("label", { class: "field wide" }, this.#slider, this.#text);
    this.element.hidden = frames.length === 1;
  }

  /** Follow the view. */
  render(): void {
    const { view, data } = this.#app;
    const { frames } = data.payload;
    this.#slider.value = String(view.frame);
    this.#text.textContent = frames[view.frame];
    this.#slider.setAttribute("aria-valuetext", frames[view.frame]);
  }
}

/** What is shown, its colours, and what it is compared with. */
export class Toolbar implements Part {
  readonly element: HTMLElement;
  readonly #selects: {
    show: HTMLSelectElement;
    range: HTMLSelectElement;
    mapping: HTMLSelectElement;
    compare: HTMLSelectElement;
  };
  readonly #fields: Record<"show" | "compare", HTMLElement>;

  readonly #app: App;

  constructor(app: App) {
    this.#app = app;
    const [compareField, compare] = makeSelect("Compare", (value) => app.update({ compare: value as Comparison }));
    const [showField, show] = makeSelect("Show", (value) => app.update({ show: value as Show }));
    const [rangeField, range] = makeSelect("Scale", (value) => app.update({ range: value as RangeOf }));
    const [mappingField, mapping] = makeSelect("Colours", (value) => app.update({ mapping: value as Mapping }));
    this.#selects = { show, range, mapping, compare };
    this.#fields = { show: showField, compare: compareField };
    this.element = make("div", { class: "toolbar" }, compareField, showField, rangeField, mappingField);
  }

  /** Follow the view. */
  render(): void {
    const { view, data } = this.#app;
    const { runs } = data.payload;
    const allowed = shows(view, data.payload);
    setOptions(
      this.#selects.show,
      allowed.map((show) => [show, SHOW_TEXT[show]]),
      view.show,
    );
    this.#fields.show.hidden = allowed.length === 1;
    const signed = !["weights", "mask"].includes(this.#app.shown.kind.quantity) || view.compare === "difference";
    const unit = signed ? "−1 to 1" : "0 to 1";
    const texts: Record<RangeOf, string> = { unit, head: "per head", common: "common" };
    setOptions(
      this.#selects.range,
      RANGES.map((range) => [range, texts[range]]),
      rangeOf(view, data.payload),
    );
    setOptions(this.#selects.mapping, Object.entries(MAPPING_TEXT), mappingOf(view, data.payload));
    this.#fields.compare.hidden = runs.length < 2;
    if (runs.length < 2) return;
    const choices: [Comparison, string][] = [
      ["both", "side by side"],
      ["difference", `difference: ${runs[1]} − ${runs[0]}`],
      ["first", runs[0]],
      ["second", runs[1]],
    ];
    setOptions(this.#selects.compare, choices, view.compare);
  }
}

/** Fields for hidden rows and columns, and whether the rest is renormalised. */
export class HiddenParts implements Part {
  readonly element: HTMLDetailsElement;
  readonly #summary = make("summary");
  readonly #rows: HTMLInputElement;
  readonly #columns: HTMLInputElement;
  readonly #renormalise: HTMLInputElement;
  readonly #renormaliseField: HTMLElement;

  readonly #app: App;

  constructor(app: App) {
    this.#app = app;
    this.#rows = this.#makeField("hiddenRows");
    this.#columns = this.#makeField("hiddenColumns");
    this.#renormalise = make("input", {
      type: "checkbox",
      change: () => app.update({ renormalise: this.#renormalise.checked }),
    });
    this.#renormaliseField = make("label", { class: "field" }, this.#renormalise, make("span", {}, "renormalise rows"));
    const first = make("button", { type: "button", click: () => app.update(hideChange(app, null, 0)) }, "First column");
    const reset = make("button", { type: "button", click: () => this.#reset() }, "Show all");
    const body = make(
      "div",
      { class: "toolbar" },
      make("label", { class: "field" }, make("span", {}, "Columns"), this.#columns),
      make("label", { class: "field" }, make("span", {}, "Rows"), this.#rows),
      first,
      reset,
      this.#renormaliseField,
    );
    this.element = make("details", { class: "hide" }, this.#summary, body);
  }

  /** Follow the view. */
  render(): void {
    const { view, data } = this.#app;
    const [rows, columns] = [view.hiddenRows[view.kind], view.hiddenColumns[view.kind]];
    // What is being written is not replaced under the cursor.
    if (document.activeElement !== this.#rows) this.#rows.value = rows;
    if (document.activeElement !== this.#columns) this.#columns.value = columns;
    this.#renormalise.checked = view.renormalise;
    this.#renormaliseField.hidden = !hasMass(view, data.payload);
    const parts = [columns && `columns ${columns}`, rows && `rows ${rows}`].filter(Boolean);
    this.#summary.textContent = parts.length ? `Hidden: ${parts.join("; ")}` : "Hide rows or columns";
    const { block } = this.#app.shown.layer;
    this.element.title = Math.max(...block) > 1 ? "Cells are pooled: the whole block of a position is hidden" : "";
  }

  #makeField(key: "hiddenRows" | "hiddenColumns"): HTMLInputElement {
    const change = () => {
      const { view } = this.#app;
      this.#app.update({
        [key]: view[key].map((old, kind) => (kind === view.kind ? field.value : old)),
      } as Partial<View>);
    };
    const field = make("input", { type: "text", placeholder: "0, 5-7", spellcheck: "false", change });
    return field;
  }

  #reset(): void {
    const { view } = this.#app;
    const without = (texts: string[]) => texts.map((text, kind) => (kind === view.kind ? "" : text));
    this.#app.update({ hiddenRows: without(view.hiddenRows), hiddenColumns: without(view.hiddenColumns) });
  }
}
