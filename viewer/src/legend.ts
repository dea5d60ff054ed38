/** What the colours mean. */
import type { App, Part } from "./app";
import { make, prepareCanvas } from "./dom";
import { formatNumber } from "./names";
import { css } from "./palette";
import { DECADES, type Scale, valueAt } from "./raster";

const WIDTH = 200;
const HEIGHT = 12;

/** The bar of colours with its ends, and a sample of each special colour that occurs. */
export class Legend implements Part {
  readonly element = make("div", { class: "legend" });
  readonly #canvas = make("canvas", { role: "img" });

  readonly #app: App;

  constructor(app: App) {
    this.#app = app;
  }

  /** Follow the view. */
  render(): void {
    const { view, shown, scene, theme } = this.#app;
    const sheets = shown.sources.map((source) => ({ source, sheet: scene.shown(view, source) }));
    const surveys = sheets.map(({ sheet }) => scene.survey(sheet));
    // Side by side, each map may have its own range; the legend is of the first, and says so.
    const scales = sheets.map(({ source, sheet }) => scene.scale(view, source, sheet));
    const [scale] = scales;
    this.#draw(scale);
    const most = Math.max(...surveys.map(({ low, high }) => Math.max(high, scale.signed ? -low : high)));
    const above = most > scale.most * (1 + 1e-6) ? "≥ " : "";
    const ends = [text(valueAt(0, scale), scale, scale.signed ? above && "≤ " : ""), text(scale.most, scale, above)];
    const items: Node[] = [make("span", {}, ends[0]), this.#canvas, make("span", {}, ends[1])];
    if (scales.length > 1 && scales[1].most !== scale.most)
      items.push(make("span", {}, `(right: ${formatNumber(scales[1].most)})`));
    if (scale.mapping !== "linear") items.push(make("span", { class: "muted" }, mappingText(scale)));
    const { palette } = theme;
    const specials: [string, boolean, number][] = [
      ["masked", surveys.some((s) => s.masked), palette.masked[0]],
      ["NaN", surveys.some((s) => s.nan), palette.nan],
      ["+∞", surveys.some((s) => s.positive), palette.positive],
      ["−∞", surveys.some((s) => s.negative), palette.negative],
    ];
    for (const [name, occurs, colour] of specials) {
      if (!occurs) continue;
      const sample = make("span", { class: "sample", "aria-hidden": "true" });
      sample.style.background = css(colour);
      if (name === "masked") {
        const [a, b] = palette.masked.map(css);
        sample.style.background = `repeating-conic-gradient(${a} 0 25%, ${b} 0 50%) 0 0 / 6px 6px`;
      }
      items.push(make("span", { class: "special" }, sample, name));
    }
    this.element.replaceChildren(...items);
    this.#canvas.setAttribute("aria-label", `Colours from ${ends[0]} to ${ends[1]}`);
  }

  #draw(scale: Scale): void {
    const context = prepareCanvas(this.#canvas, WIDTH, HEIGHT);
    const { palette } = this.#app.theme;
    const table = scale.signed ? palette.diverging : palette.sequential;
    for (let x = 0; x < WIDTH; x++) {
      context.fillStyle = css(table[Math.round((x / (WIDTH - 1)) * (table.length - 1))]);
      context.fillRect(x, 0, 1, HEIGHT);
    }
  }
}

function text(value: number, scale: Scale, above: string): string {
  const least = !scale.signed && scale.mapping === "log" && value < scale.most;
  return least ? `≤ ${formatNumber(value)}` : above + formatNumber(value);
}

function mappingText(scale: Scale): string {
  return scale.mapping === "root" ? "square root" : `logarithm, ${DECADES} decades`;
}
