// The browser side of rorem_lib.drawing.brush: a mask is drawn over an image and sent as a PNG whose
// alpha is the mask. What was drawn is kept as a list of strokes, so undo draws the list anew.

const COLOUR = "#ff006e";
const VIEW_ALPHA = 0.5;
const ZOOM = 1.25; // a step of the keys + and -
const SIZE = 1.2; // a step of the keys [ and ]
const EDITOR_HEIGHT = 160; // of VS Code's bars around a notebook, CSS pixels
const PATIENCE_MS = 4000; // no answer of the kernel for this long: say so
const TOOLS = {
  brush: ["Brush", "b", "paint what is to be removed"],
  erase: ["Eraser", "e", "take paint away"],
  box: ["Box", "r", "draw a rectangle: what is in it is removed"],
  move: ["Move", "h", "drag the image; with two fingers, the middle button or Space held, any tool does"],
};
const ACTIONS = {
  undo: ["Undo", "u", "take back the last stroke (also Ctrl+Z)"],
  redo: ["Redo", "y", "do it again (also Ctrl+Shift+Z)"],
  clear: ["Clear", "c", "start with an empty mask; Undo brings it back"],
  closer: ["Zoom in", "+", "enlarge the image (also the wheel)"],
  farther: ["Zoom out", "-", "make it smaller"],
  fit: ["Fit", "0", "show the whole image"],
};

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

function render({ model, el }) {
  const { action } = model.get("settings");
  let size = [1, 1]; // of the image, px
  let photo = null; // bitmap, perhaps smaller than the image
  let start = null; // bitmap of the mask that this view began with
  let done = []; // strokes, boxes and clearings on it
  let undone = [];
  let current = null; // the stroke or box that is being drawn
  let tool = "brush";
  let diameter = 1; // of the brush, px of the image
  let view = null; // { cx, cy, scale }: px of the image in the middle, CSS px for each of them
  let [width, height] = [0, 300]; // of the canvas, CSS px
  let hover = null; // where the brush is, CSS px
  let spaced = false; // Space is held
  let drag = null;
  const fingers = new Map(); // of a touch: pointerId -> [x, y]
  let frame = 0;
  let encoding = null; // the mask's way to the kernel
  let dirty = false;
  let patience = 0;
  const mask = make("canvas"); // of the image's own size; alpha is the mask
  const paint = mask.getContext("2d");

  // ------------------------------------------------------------------ elements
  const buttons = {};
  const makeButton = (name, [text, key, help], kind) => {
    buttons[name] = make(
      "button",
      { type: "button", "data-action": name, class: kind, title: help, "aria-label": `${text}: ${help}`, "aria-keyshortcuts": key },
      make("kbd", { "aria-hidden": "true" }, key),
      make("span", {}, text),
    );
    buttons[name].addEventListener("click", () => perform(name));
    return buttons[name];
  };
  const slider = make("input", { type: "range", min: 0, max: 100, step: 1, "aria-label": "size of the brush, keys [ and ]", title: "size of the brush [ and ]" });
  const sizeText = make("span", { class: "size" });
  const status = make("span", { class: "status", role: "status" });
  const canvas = make("canvas", { class: "photo", role: "img" });
  const remove = make("button", { type: "button", class: "act", "data-action": "act", "aria-keyshortcuts": "Enter" }, action);
  remove.hidden = !action;
  remove.addEventListener("click", act);
  const root = make(
    "div",
    { class: "rorem-widget rorem-brush", tabindex: "0", role: "application", "data-lm-suppress-shortcuts": "true",
      "aria-label": "Draw what is to be removed. Each tool is a button with its key; without a pointer set mask_box or mask_path." },
    make(
      "div",
      { class: "tools", role: "toolbar", "aria-label": "tools" },
      make("div", { class: "group", role: "group", "aria-label": "draw" }, ...Object.entries(TOOLS).map(([n, x]) => makeButton(n, x, "tool"))),
      make("label", { class: "group sizes" }, make("kbd", { "aria-hidden": "true" }, "["), slider, make("kbd", { "aria-hidden": "true" }, "]"), sizeText),
      make("div", { class: "group", role: "group", "aria-label": "history and view" }, ...Object.entries(ACTIONS).map(([n, x]) => makeButton(n, x, "step"))),
    ),
    canvas,
    make("div", { class: "foot" }, status, remove),
  );
  el.append(root);

  // ------------------------------------------------------------------ the mask
  function draw(context, stroke, from = 0) {
    context.globalCompositeOperation = stroke.erase ? "destination-out" : "source-over";
    context.fillStyle = context.strokeStyle = COLOUR;
    if (stroke.kind === "clear") context.clearRect(0, 0, mask.width, mask.height);
    else if (stroke.kind === "box") context.fillRect(...stroke.area);
    else {
      // Piece by piece, as it was drawn with the pointer: else edges differ after an undo.
      const { points } = stroke;
      Object.assign(context, { lineWidth: stroke.diameter, lineCap: "round" });
      for (let i = from; i < points.length; i++) {
        context.beginPath();
        if (i) {
          context.moveTo(...points[i - 1]);
          context.lineTo(...points[i]);
          context.stroke();
        } else {
          context.arc(...points[0], stroke.diameter / 2, 0, 2 * Math.PI); // a line of no length is none
          context.fill();
        }
      }
    }
    context.globalCompositeOperation = "source-over";
  }

  function rebuild() {
    paint.clearRect(0, 0, mask.width, mask.height);
    if (start) {
      paint.drawImage(start, 0, 0);
      paint.globalCompositeOperation = "source-in"; // its alpha, in our colour
      paint.fillStyle = COLOUR;
      paint.fillRect(0, 0, mask.width, mask.height);
      paint.globalCompositeOperation = "source-over";
    }
    done.forEach((stroke) => draw(paint, stroke));
    if (current?.points) draw(paint, current);
  }

  function commit(stroke) {
    done.push(stroke);
    undone = [];
    change();
  }

  function change() {
    show();
    dirty = true;
    send();
  }

  // One PNG at a time: what is drawn while one is made goes with the next.
  function send() {
    encoding ??= encode().finally(() => (encoding = null));
    return encoding;
  }

  async function encode() {
    while (dirty) {
      dirty = false;
      setStatus("sending");
      const blob = await new Promise((resolve) => mask.toBlob(resolve, "image/png"));
      const data = await blob.arrayBuffer();
      if (dirty) continue;
      try {
        model.send({ kind: "mask" }, {}, [data]);
        setStatus("sent");
      } catch (error) {
        say(`The notebook has lost its kernel (${error.message}): run it again.`, true);
      }
    }
  }

  async function act() {
    if (remove.disabled) return;
    remove.disabled = true;
    await send();
    patience = setTimeout(() => {
      remove.disabled = false;
      say("The kernel does not answer: it is busy, or gone. If it was restarted, run the notebook again.", true);
    }, PATIENCE_MS);
    model.send({ kind: "act" });
  }

  // Of a smaller copy: for the eye alone.
  function measureShare() {
    const small = make("canvas", { width: 200, height: Math.max(1, Math.round((200 * size[1]) / size[0])) });
    const context = small.getContext("2d");
    context.drawImage(mask, 0, 0, small.width, small.height);
    const { data } = context.getImageData(0, 0, small.width, small.height);
    let sum = 0;
    for (let i = 3; i < data.length; i += 4) sum += data[i];
    return sum / 255 / (data.length / 4);
  }

  function setStatus(kind) {
    root.dataset.mask = kind;
    const share = measureShare();
    const text = share ? `the mask covers ${(100 * share).toFixed(share < 0.1 ? 1 : 0)}% of the image` : "nothing is drawn yet: paint over what is to be removed, with a small margin";
    canvas.setAttribute("aria-label", `image of ${size[0]} x ${size[1]} px; ${text}`);
    say(text);
  }

  function say(text, bad = false) {
    status.textContent = text;
    status.classList.toggle("bad", bad);
  }

  // ------------------------------------------------------------------ showing
  function measure() {
    const port = root.closest(".jp-WindowedPanel-outer, .jp-LinkedOutputView");
    const rest = root.offsetHeight - canvas.offsetHeight;
    const visible = Math.min(window.innerHeight - 40, screen.availHeight - EDITOR_HEIGHT);
    const free = (port?.clientHeight || visible) - rest - 12;
    width = root.clientWidth - 2 * parseFloat(getComputedStyle(root).paddingLeft);
    height = Math.round(Math.min((width * size[1]) / size[0], Math.max(220, free)));
    view = null;
    show();
  }

  const getView = () => (view ??= { cx: size[0] / 2, cy: size[1] / 2, scale: fitScale() });
  const fitScale = () => Math.min(width / size[0], height / size[1]);

  function show() {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      paintView();
    });
  }

  function paintView() {
    const ratio = devicePixelRatio;
    canvas.style.height = `${height}px`;
    const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
    const context = canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, w, h);
    if (!photo || !width) return;
    const scale = getView().scale * ratio;
    context.setTransform(scale, 0, 0, scale, w / 2 - view.cx * scale, h / 2 - view.cy * scale);
    context.imageSmoothingQuality = "high";
    context.drawImage(photo, 0, 0, ...size);
    context.globalAlpha = VIEW_ALPHA;
    context.drawImage(mask, 0, 0, ...size);
    context.globalAlpha = 1;
    if (current?.kind === "box") {
      context.lineWidth = 2 / view.scale;
      context.strokeStyle = COLOUR;
      context.strokeRect(...scaleArea(current.area));
    }
    if (hover && (tool === "brush" || tool === "erase") && !drag && !spaced) {
      const [x, y] = toImage(hover);
      for (const [colour, line] of [["#000000", 3], ["#ffffff", 1.5]]) {
        context.beginPath();
        context.arc(x, y, diameter / 2, 0, 2 * Math.PI);
        Object.assign(context, { lineWidth: line / view.scale, strokeStyle: colour });
        context.stroke();
      }
    }
    for (const name of Object.keys(TOOLS)) buttons[name].setAttribute("aria-pressed", tool === name);
    buttons.undo.disabled = !done.length;
    buttons.redo.disabled = !undone.length;
    buttons.farther.disabled = buttons.fit.disabled = view.scale <= fitScale() * 1.001;
    canvas.style.cursor = tool === "move" || spaced ? "grab" : "crosshair";
  }

  function toImage([x, y]) {
    const { cx, cy, scale } = getView();
    return [cx + (x - width / 2) / scale, cy + (y - height / 2) / scale];
  }

  // The mask is smaller than an image above the size that browsers have canvases of.
  const toMask = (point) => point.map((value, axis) => (value * [mask.width, mask.height][axis]) / size[axis]);
  const scaleArea = (area) => area.map((value, i) => (value * size[i % 2]) / [mask.width, mask.height][i % 2]);

  function moveView(dx, dy) {
    const view = getView();
    view.cx = clamp(view.cx - dx / view.scale, 0, size[0]);
    view.cy = clamp(view.cy - dy / view.scale, 0, size[1]);
    show();
  }

  function zoomView(factor, [x, y] = [width / 2, height / 2]) {
    const { scale: before } = getView();
    const scale = clamp(before * factor, fitScale(), Math.max(32, fitScale()));
    if (scale === fitScale()) view = null;
    else {
      view.cx += (x - width / 2) * (1 / before - 1 / scale); // what is at x, y stays there
      view.cy += (y - height / 2) * (1 / before - 1 / scale);
      view.scale = scale;
    }
    show();
  }

  // ------------------------------------------------------------------ acting
  const sizeRange = () => [1, Math.max(2, Math.min(...size) / 2)];

  function setDiameter(value) {
    const [low, high] = sizeRange();
    diameter = clamp(value, low, high);
    slider.value = (100 * Math.log(diameter / low)) / Math.log(high / low);
    sizeText.textContent = `${Math.round(diameter)} px`;
    slider.setAttribute("aria-valuetext", `${Math.round(diameter)} pixels`);
    show();
  }

  slider.addEventListener("input", () => {
    const [low, high] = sizeRange();
    setDiameter(low * (high / low) ** (slider.value / 100));
  });

  function perform(name) {
    if (!photo) return;
    if (name in TOOLS) tool = name;
    else if (name === "undo" || name === "redo") {
      const [from, to] = name === "undo" ? [done, undone] : [undone, done];
      if (!from.length) return;
      to.push(from.pop());
      rebuild();
      return change();
    } else if (name === "clear") {
      draw(paint, { kind: "clear" });
      return commit({ kind: "clear" });
    } else if (name === "fit") view = null;
    else zoomView(name === "closer" ? ZOOM : 1 / ZOOM);
    show();
  }

  const byKey = Object.fromEntries(Object.entries({ ...TOOLS, ...ACTIONS }).map(([name, [, key]]) => [key, name]));
  byKey["="] = "closer"; // + without Shift

  function onKeyDown(event) {
    event.stopPropagation(); // a notebook's own shortcuts (d d deletes a cell) stay out of this
    const key = event.key.toLowerCase();
    if (event.ctrlKey || event.metaKey) {
      const name = key === "y" || (key === "z" && event.shiftKey) ? "redo" : key === "z" ? "undo" : null;
      if (!name) return;
      event.preventDefault();
      return perform(name);
    }
    if (event.altKey || (event.target.tagName === "BUTTON" && (key === " " || key === "enter"))) return;
    if (key === " ") spaced = true;
    else if (key === "[" || key === "]") setDiameter(diameter * (key === "]" ? SIZE : 1 / SIZE));
    else if (key === "escape") cancel();
    else if (key === "enter") act();
    else if (key in byKey) perform(byKey[key]);
    else return;
    event.preventDefault();
    show();
  }

  function onKeyUp(event) {
    event.stopPropagation();
    if (event.key === " ") spaced = false;
    show();
  }

  const locate = (event) => {
    const area = canvas.getBoundingClientRect();
    return [event.clientX - area.left, event.clientY - area.top];
  };

  function onDown(event) {
    if (!photo) return;
    event.preventDefault();
    root.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    const place = locate(event);
    if (event.pointerType === "touch") fingers.set(event.pointerId, place);
    if (fingers.size > 1) {
      cancel(); // the first finger's stroke was none
      drag = { fingers: true };
      return;
    }
    if (tool === "move" || spaced || event.button === 1) drag = { from: place };
    else if (event.button !== 0 && event.button !== 5) return; // 5: the back end of a pen
    else begin(toMask(toImage(place)), event.button === 5 || tool === "erase");
    show();
  }

  function begin(point, erase) {
    if (tool === "box" && !erase) current = { kind: "box", from: point, area: [...point, 0, 0] };
    else {
      current = { kind: "stroke", erase, diameter: (diameter * mask.width) / size[0], points: [point] };
      draw(paint, current);
    }
  }

  function onMove(event) {
    const place = locate(event);
    hover = event.pointerType === "touch" ? null : place;
    if (drag?.fingers && fingers.has(event.pointerId)) pinch(event.pointerId, place);
    else if (drag?.from) {
      moveView(place[0] - drag.from[0], place[1] - drag.from[1]);
      drag.from = place;
    } else if (current) extend(event.getCoalescedEvents?.() ?? [], event);
    show();
  }

  function extend(between, event) {
    const points = (between.length ? between : [event]).map((e) => toMask(toImage(locate(e))));
    if (current.kind === "box") {
      const [x, y] = points.at(-1);
      const xs = [current.from[0], x].map((v) => clamp(v, 0, mask.width)).sort((a, b) => a - b);
      const ys = [current.from[1], y].map((v) => clamp(v, 0, mask.height)).sort((a, b) => a - b);
      const [x0, y0] = [Math.floor(xs[0]), Math.floor(ys[0])]; // whole pixels, those it touches
      current.area = [x0, y0, Math.ceil(xs[1]) - x0, Math.ceil(ys[1]) - y0];
    } else {
      const from = current.points.length;
      current.points.push(...points);
      draw(paint, current, from);
    }
  }

  function pinch(id, place) {
    const [a, b] = [...fingers.values()];
    fingers.set(id, place);
    const [c, d] = [...fingers.values()];
    const between = ([x0, y0], [x1, y1]) => [(x0 + x1) / 2, (y0 + y1) / 2];
    const reach = ([x0, y0], [x1, y1]) => Math.max(1, Math.hypot(x1 - x0, y1 - y0));
    const [before, after] = [between(a, b), between(c, d)];
    moveView(after[0] - before[0], after[1] - before[1]);
    zoomView(reach(c, d) / reach(a, b), after);
  }

  function onUp(event) {
    fingers.delete(event.pointerId);
    if (drag?.fingers ? !fingers.size : drag) drag = null;
    if (current) {
      const stroke = current;
      current = null;
      if (stroke.kind === "box" && !(stroke.area[2] && stroke.area[3])) return show();
      if (stroke.kind === "box") draw(paint, stroke);
      commit(stroke);
    }
    show();
  }

  function cancel() {
    if (!current) return;
    current = null;
    rebuild();
    show();
  }

  // ------------------------------------------------------------------ messages
  async function onMessage(content, buffers) {
    if (content.kind === "open") {
      if (photo) return; // another view asked
      size = content.size;
      [mask.width, mask.height] = content.mask_size;
      const [shown, drawn] = buffers.map((buffer) => new Blob([buffer]));
      try {
        start = drawn.size ? await createImageBitmap(drawn) : null;
        photo = await createImageBitmap(shown);
      } catch (error) {
        return say(`The image cannot be shown: ${error.message}`, true);
      }
      setDiameter(Math.min(...size) / 16);
      rebuild();
      measure();
      setStatus("sent");
    } else {
      clearTimeout(patience);
      remove.disabled = content.kind === "busy";
      root.dataset.busy = content.kind === "busy";
      say(content.text, content.kind === "failed");
    }
  }

  root.addEventListener("keydown", onKeyDown);
  root.addEventListener("keyup", onKeyUp);
  root.addEventListener("blur", () => (spaced = false));
  canvas.addEventListener("pointerdown", onDown);
  canvas.addEventListener("pointermove", onMove);
  canvas.addEventListener("pointerup", onUp);
  canvas.addEventListener("pointercancel", (event) => {
    fingers.delete(event.pointerId);
    drag = null;
    cancel();
  });
  canvas.addEventListener("pointerleave", () => {
    hover = null;
    show();
  });
  canvas.addEventListener(
    "wheel",
    (event) => {
      if (!photo || !(event.ctrlKey || root.contains(document.activeElement))) return; // else the page scrolls
      event.preventDefault();
      zoomView(Math.exp(-event.deltaY / 400), locate(event));
    },
    { passive: false },
  );
  const resized = new ResizeObserver(measure);
  resized.observe(root.querySelector(".tools"));
  window.addEventListener("resize", measure);
  model.on("msg:custom", onMessage);
  say("opening …");
  model.send({ kind: "ready" });

  return () => {
    model.off("msg:custom", onMessage);
    resized.disconnect();
    window.removeEventListener("resize", measure);
    clearTimeout(patience);
    photo?.close();
    start?.close();
  };
}

export default { render };
