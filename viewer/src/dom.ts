/** Making elements. Text is only ever set as text. */

type Attributes = Record<string, string | number | boolean | ((event: never) => void)>;

/** Make an element; a function is a listener, `true` an attribute without a value, `false` no attribute. */
export function make<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Attributes = {},
  ...children: (Node | string)[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value as unknown as EventListener);
    else if (value !== false) element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children);
  return element;
}

/** Make a select with a label before it; `change` gets the chosen value. */
export function makeSelect(label: string, change: (value: string) => void): [HTMLLabelElement, HTMLSelectElement] {
  const select = make("select", { change: () => change(select.value) });
  return [make("label", { class: "field" }, make("span", {}, label), select), select];
}

/** Set the options of a select, `[value, text]` each, if they differ from those that it has, and the chosen one. */
export function setOptions(select: HTMLSelectElement, options: [string, string][], value: string): void {
  const same =
    select.options.length === options.length &&
    options.every(([v, text], i) => {
      const option = select.options[i];
      return option.value === v && option.textContent === text;
    });
  if (!same) select.replaceChildren(...options.map(([v, text]) => make("option", { value: v }, text)));
  select.value = value;
}

/** Give a canvas a size in CSS pixels, sharp on the device, and return its context, cleared, in CSS pixels. */
export function prepareCanvas(canvas: HTMLCanvasElement, width: number, height: number): CanvasRenderingContext2D {
  const ratio = pixelRatio();
  const [deviceWidth, deviceHeight] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== deviceWidth || canvas.height !== deviceHeight) {
    canvas.width = deviceWidth;
    canvas.height = deviceHeight;
    canvas.style.width = deviceWidth / ratio + "px";
    canvas.style.height = deviceHeight / ratio + "px";
  }
  const context = canvas.getContext("2d")!;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

/** Return the device pixels per CSS pixel. */
export function pixelRatio(): number {
  return window.devicePixelRatio || 1;
}

/** The font of labels on canvases. */
export const FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif';

/** Return the text, cut with an ellipsis so that it is at most `width` wide. */
export function fitText(context: CanvasRenderingContext2D, text: string, width: number): string {
  if (context.measureText(text).width <= width) return text;
  const characters = Array.from(text);
  let low = 0;
  let high = characters.length;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (context.measureText(characters.slice(0, middle).join("") + "…").width <= width) low = middle;
    else high = middle - 1;
  }
  return characters.slice(0, low).join("") + "…";
}

/** Return a function that calls `action` once, `wait` milliseconds after the last of its calls. */
export function debounce(action: () => void, wait: number): () => void {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = window.setTimeout(action, wait);
  };
}
