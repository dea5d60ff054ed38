/** The chosen head: its heading, the ways to look at it, and the tools of each. */
import type { App, Part } from "./app";
import { make } from "./dom";
import { Legend } from "./legend";
import { HeadMap } from "./map";
import { PictureView } from "./picture";
import { Readout } from "./readout";
import { savePng, saveSvg } from "./save";
import { type Tab, TABS } from "./state";
import { Tokens } from "./tokens";

const TAB_TEXT: Record<Tab, string> = { map: "Map", tokens: "Tokens", picture: "Picture" };

/** The right side of the page. */
export class Panel implements Part {
  readonly element: HTMLElement;
  readonly maps: HeadMap[];
  readonly #heading = make("h2");
  readonly #tabs: Record<Tab, HTMLButtonElement>;
  readonly #zoom: HTMLElement;
  readonly #mapRow: HTMLElement;
  readonly #parts: Part[];

  readonly #app: App;

  constructor(app: App) {
    this.#app = app;
    this.maps = app.data.payload.runs.map((_, index) => new HeadMap(app, index));
    const views = [new Tokens(app), new PictureView(app)];
    const legend = new Legend(app);
    const readout = new Readout(app);
    this.#parts = [...this.maps, ...views, legend, readout];
    const button = (text: string, label: string, click: () => void) =>
      make("button", { type: "button", "aria-label": label, title: label, click }, text);
    this.#tabs = Object.fromEntries(
      TABS.map((tab) => [tab, make("button", { type: "button", click: () => app.update({ tab }) }, TAB_TEXT[tab])]),
    ) as Record<Tab, HTMLButtonElement>;
    this.#zoom = make(
      "div",
      { class: "buttons", role: "group", "aria-label": "Size" },
      button("−", "Smaller", () => app.update({ zoom: Math.max(app.view.zoom - 1, 0) })),
      button("Fit", "Fit", () => app.update({ zoom: 0 })),
      button("+", "Larger", () => app.update({ zoom: Math.min(app.view.zoom + 1, 20) })),
    );
    const save = make(
      "div",
      { class: "buttons", role: "group", "aria-label": "Save" },
      button("PNG", "Save the map as PNG", () => this.#save(savePng)),
      button("SVG", "Save the map as SVG", () => this.#save(saveSvg)),
    );
    const tabs = make("div", { class: "buttons", role: "group", "aria-label": "View" }, ...Object.values(this.#tabs));
    const tools = make("div", { class: "toolbar" }, tabs, this.#zoom, save);
    this.#mapRow = make("div", { class: "maps" }, ...this.maps.map((map) => map.element));
    this.element = make(
      "section",
      { class: "head", "aria-label": "Chosen head" },
      make("div", { class: "heading" }, this.#heading, tools),
      legend.element,
      this.#mapRow,
      ...views.map((view) => view.element),
      readout.element,
    );
    this.#scrollTogether();
  }

  /** Follow the view. */
  render(): void {
    const { view, data } = this.#app;
    const { kind, layer, sources } = this.#app.shown;
    const texts = {
      head: `${layer.name}, head ${view.head}`,
      mean: `${layer.name}, mean of ${layer.heads} heads`,
      max: `${layer.name}, maximum of ${layer.heads} heads`,
      rollout: `Rollout up to ${layer.name}`,
    };
    // Tokens and picture are of one run.
    const run = view.tab !== "map" && sources.length > 1 ? ` (${data.payload.runs[0]})` : "";
    this.#heading.textContent = texts[view.show] + run;
    for (const tab of TABS) this.#tabs[tab].setAttribute("aria-pressed", String(tab === view.tab));
    this.#tabs.picture.hidden = !kind.picture;
    this.#zoom.hidden = view.tab !== "map";
    this.#mapRow.hidden = view.tab !== "map";
    for (const part of this.#parts) if (!this.#mapRow.hidden || !this.maps.includes(part as HeadMap)) part.render();
  }

  /** Scrolling one map scrolls the one beside it. */
  #scrollTogether(): void {
    const boxes = this.maps.map((map) => map.box);
    for (const box of boxes) {
      box.addEventListener("scroll", () => {
        for (const other of boxes) other.scrollTo(box.scrollLeft, box.scrollTop);
      });
    }
  }

  #save(write: typeof savePng): void {
    const { view, shown, data } = this.#app;
    const name = [data.payload.title, shown.kind.name, this.#heading.textContent ?? ""];
    // The maps are laid out only while they are in view.
    if (view.tab !== "map") this.#app.update({ tab: "map" });
    this.#app.flush();
    const { sources } = this.#app.shown;
    sources.forEach((source, i) => write(this.maps[i].wholePicture(), sources.length > 1 ? [...name, source] : name));
  }
}
