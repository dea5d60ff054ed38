/** What the colours mean. */
import type { App, Part } from "./app";
import { make, prepareCanvas } from "./dom";
import { formatNumber } from "./names";
import { css, type Palette } from "./palette";
import type { Survey } from "./sheet";
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
    const surveys = shown.sources.map((source) => scene.survey(scene.shown(view, source)));
    const scale = scene.shownScale(view, shown.sources);
    this.#draw(scale);
    const most = Math.max(...surveys.map(({ low, high }) => Math.max(high, scale.signed ? -low : high)));
    const above = most > scale.most * (1 + 1e-6) ? "≥ " : "";
    const ends = [text(valueAt(0, scale), scale, scale.signed ? above && "≤ " : ""), text(scale.most, scale, above)];
    const items: Node[] = [make("span", {}, ends[0]), this.#canvas, make("span", {}, ends[1])];
    if (scale.mapping !== "linear") items.push(make("span", { class: "muted" }, mappingText(scale)));
    items.push(...makeSpecials(surveys, theme.palette));
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

/** Return a sample and a name of each colour that stands for no number, if it occurs. */
function makeSpecials(surveys: Survey[], palette: Palette): HTMLElement[] {
  const [even, odd] = palette.masked.map(css);
  const colours = {
    masked: ["masked", `repeating-conic-gradient(${even} 0 25%, ${odd} 0 50%) 0 0 / 6px 6px`],
    nan: ["NaN", css(palette.nan)],
    positive: ["+∞", css(palette.positive)],
    negative: ["−∞", css(palette.negative)],
  } as const;
  return (["masked", "nan", "positive", "negative"] as const)
    .filter((special) => surveys.some((found) => found[special]))
    .map((special) => {
      const [name, background] = colours[special];
      const sample = make("span", { class: "sample", "aria-hidden": "true" });
      sample.style.background = background;
      return make("span", { class: "special" }, sample, name);
    });
}

function text(value: number, scale: Scale, above: string): string {
  const least = !scale.signed && scale.mapping === "log" && value < scale.most;
  return least ? `≤ ${formatNumber(value)}` : above + formatNumber(value);
}

function mappingText(scale: Scale): string {
  return scale.mapping === "root" ? "square root" : `logarithm, ${DECADES} decades`;
}
