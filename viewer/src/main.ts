/** Start: read the data of the page, mount the parts, and draw them again when the view changes. */
import "./style.css";
import { type App, applyTheme, type Part, type Theme } from "./app";
import { FrameSlider, HiddenParts, KindTabs, Toolbar } from "./controls";
import { debounce, make } from "./dom";
import { Grid } from "./grid";
import { fromHash, toHash } from "./hash";
import { Header, makeHelp } from "./header";
import { Panel } from "./panel";
import { Data, type Payload, withReadableTexts } from "./payload";
import { Scene, type Shown, shownOf } from "./scene";
import { initialView, kindOf, settle, type View } from "./state";

/** The handle for tests and scripts: `window.attnViewer`. Rows and columns are numbers of stored cells. */
interface Handle {
  /** The view, with the name of its kind. */
  state(): Record<string, unknown>;
  /** The rectangle in the window of a cell of the (first) large map. */
  cellRect(row: number, column: number): DOMRect;
  /** The rectangle in the window of a thumbnail of the overview. */
  gridRect(layer: number, head: number): DOMRect;
}

class Viewer implements App {
  readonly scene: Scene;
  readonly grid: Grid;
  readonly panel: Panel;
  view: View;
  shown: Shown;
  theme: Theme;
  readonly #initial: View;
  readonly #parts: Part[];
  readonly #page: HTMLElement[];
  readonly #body = make("div", { id: "attn-panel" });
  readonly #remember = debounce(() => writeHash(toHash(this.view, this.#initial)), 300);
  #frame = 0;

  constructor(readonly data: Data) {
    this.scene = new Scene(data);
    this.#initial = settle(initialView(data.payload), data.payload);
    this.view = settle(fromHash(readHash(), this.#initial), data.payload);
    this.shown = shownOf(this.view, data.payload);
    this.theme = applyTheme(this.view.theme);
    this.grid = new Grid(this);
    this.panel = new Panel(this);
    const [header, tabs, slider] = [new Header(this), new KindTabs(this), new FrameSlider(this)];
    const [toolbar, hidden] = [new Toolbar(this), new HiddenParts(this)];
    // Controls before pictures: their height decides where the pictures are.
    this.#parts = [header, tabs, slider, toolbar, hidden, this.grid, this.panel];
    const controls = make("div", { class: "controls" }, slider.element, toolbar.element, hidden.element);
    const content = make("div", { class: "content" }, this.grid.element, this.panel.element);
    this.#body.append(controls, content);
    if (!tabs.element.hidden) this.#body.setAttribute("role", "tabpanel");
    this.#page = [header.element, tabs.element, this.#body, makeHelp()];
  }

  /** Put the page into an element and draw the first picture. */
  mount(root: HTMLElement): void {
    root.replaceChildren(...this.#page);
    this.#listen();
    this.flush();
  }

  /** Draw what had to wait for sheets that have now arrived. */
  complete(): void {
    this.scene.forget();
    this.flush();
  }

  update(change: Partial<View>): void {
    this.view = settle({ ...this.view, ...change }, this.data.payload);
    this.shown = shownOf(this.view, this.data.payload);
    if (change.theme) this.theme = applyTheme(this.view.theme);
    this.#schedule();
    this.#remember();
  }

  flush(): void {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    if (this.#body.role) this.#body.setAttribute("aria-labelledby", `attn-tab-${this.view.kind}`);
    for (const part of this.#parts) part.render();
  }

  #schedule(): void {
    this.#frame ||= requestAnimationFrame(() => this.flush());
  }

  #listen(): void {
    const redraw = () => this.#schedule();
    addEventListener("resize", redraw);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
      this.update({ theme: this.view.theme }),
    );
    addEventListener("hashchange", () => this.update(fromHash(readHash(), this.#initial)));
    // The width changes without the window where a scroll bar comes or goes, or an iframe becomes visible.
    new ResizeObserver(redraw).observe(this.#body);
  }
}

/** Show a payload: the first picture as soon as its sheet has arrived, then the rest. */
async function show(root: HTMLElement, payload: Payload): Promise<void> {
  const data = new Data(payload);
  const viewer = new Viewer(data);
  const loading = data.load();
  await Promise.race([data.until(viewer.scene.needs(viewer.view)), loading]);
  viewer.mount(root);
  const handle: Handle = {
    state: () => ({ ...viewer.view, kind: kindOf(viewer.view, payload).name, kindNumber: viewer.view.kind }),
    cellRect: (row, column) => viewer.panel.maps[0].cellRect(row, column),
    gridRect: (layer, head) => viewer.grid.headRect({ layer, head }),
  };
  Object.assign(window, { attnViewer: handle });
  performance.mark("attn-first-picture");
  document.documentElement.dataset.ready = "true";
  await loading;
  viewer.complete();
}

function readHash(): string {
  try {
    return location.hash;
  } catch {
    return "";
  }
}

/** An iframe without an origin of its own may refuse; the view then is not kept, and nothing else changes. */
function writeHash(text: string): void {
  try {
    history.replaceState(null, "", text ? "#" + text : location.pathname + location.search);
  } catch {
    return;
  }
}

async function start(): Promise<void> {
  const root = document.getElementById("attn-viewer")!;
  try {
    const text = document.getElementById("attn-data")!.textContent!;
    await show(root, withReadableTexts(JSON.parse(text) as Payload));
  } catch (error) {
    root.replaceChildren(
      make("p", { class: "error", role: "alert" }, `The attention viewer cannot show this page: ${error}`),
    );
  }
}

void start();
