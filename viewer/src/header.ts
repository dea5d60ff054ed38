/** Title, note, theme, and help. */
import type { App, Part } from "./app";
import { make, makeSelect, setOptions } from "./dom";
import type { View } from "./state";

const KEYS: [string, string][] = [
  ["Arrow keys", "choose a head; move the crosshair, or from token to token"],
  ["Page Up, Page Down", "ten rows up or down"],
  ["Home, End", "first and last column; with Ctrl, first and last row"],
  ["Enter or click", "pin the row, so that the pointer moves along it"],
  ["h, Shift + h", "hide the column or the row of the crosshair; so does a click on its name"],
  ["+, −, 0", "larger, smaller, fit"],
];

/** The title, what is exact or rounded, and the choice of light or dark. */
export class Header implements Part {
  readonly element: HTMLElement;
  readonly #theme: HTMLSelectElement;

  readonly #app: App;

  constructor(app: App) {
    this.#app = app;
    const { title, note } = app.data.payload;
    const [field, theme] = makeSelect("Theme", (value) => app.update({ theme: value as View["theme"] }));
    this.#theme = theme;
    setOptions(
      theme,
      [
        ["auto", "automatic"],
        ["light", "light"],
        ["dark", "dark"],
      ],
      "auto",
    );
    const text = make(
      "div",
      {},
      make("h1", { dir: "auto" }, title || "Attention"),
      make("p", { class: "muted" }, note),
    );
    this.element = make("header", {}, text, field);
  }

  /** Follow the view. */
  render(): void {
    this.#theme.value = this.#app.view.theme;
  }
}

/** Return the list of keys, folded. */
export function makeHelp(): HTMLElement {
  const list = make("dl", {}, ...KEYS.flatMap(([keys, text]) => [make("dt", {}, keys), make("dd", {}, text)]));
  const note = make("p", {}, "A pixel of a small picture that stands for several cells shows the largest of them.");
  return make("details", { class: "help" }, make("summary", {}, "Keys and help"), list, note);
}
