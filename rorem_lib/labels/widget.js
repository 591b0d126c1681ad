// The browser side of rorem_lib.labels.widget: shows, listens to keys, keeps nothing.
// A decision is sent with the id that is on screen; the image moves when the kernel says "saved".

const KEPT_BEHIND = 3; // places behind the current one that stay decoded, for undo
const SOON_MS = 100; // an answer that comes within this time is not announced
const SLOW_MS = 2000; // no answer for this long: say so
const CALM_MS = 200; // who takes this long leaves time for the next images to come later
const STRAY_MS = 1000; // no key waits this long: the browser's clocks differ, as after a suspend
const SEGMENT = 65536; // bytes: no TCP packet is larger, not even on the loopback
const EDITOR_HEIGHT = 160; // of VS Code's bars around a notebook, CSS pixels
const HOLD_MS = 300; // a flicker key held longer springs back when released
const MASK_MODES = ["outline", "both", "fill", "off"];
const VIEW_ACTIONS = {
  flicker: "Flicker",
  mask: "Mask",
  zoom: "Zoom",
  difference: "Difference",
  pixels: "Pixels",
  note: "Note",
};
// Shares of a pane's height by which the image moves: the view goes where the arrow points.
const VIEW_KEYS = {
  ArrowLeft: { dx: 0.1, dy: 0 },
  ArrowRight: { dx: -0.1, dy: 0 },
  ArrowUp: { dx: 0, dy: 0.1 },
  ArrowDown: { dx: 0, dy: -0.1 },
  "+": { factor: 1.25 },
  "-": { factor: 0.8 },
};
const PAST = { accept: "accepted", reject: "rejected", skip: "skipped" };
const HELP = {
  flicker: "source and removal in the same place; hold to peek (also: space)",
  mask: "mask: outline, outline on both, filled, off",
  zoom: "zoom to the mask's box; drag or arrow keys to move, wheel or + and - to zoom, both sides in step",
  difference: "what changed, four times brighter",
  pixels: "sharp pixels or smooth",
  note: "a free note for this image: Enter goes back, the decision takes it along",
  undo: "take back the last decision, as often as you like",
  skip: "cannot say: recorded as skipped",
};

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// The next frame's painting follows as soon as what waits for this is through: no key comes between.
function beforePaint() {
  return new Promise(requestAnimationFrame);
}

function afterPaint() {
  return new Promise((resolve) => {
    const channel = new MessageChannel(); // messages are handled after a frame has been painted
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(0);
  });
}

function makePath(outline) {
  const path = new Path2D();
  for (const points of outline) {
    path.moveTo(points[0], points[1]);
    for (let i = 2; i < points.length; i += 2) path.lineTo(points[i], points[i + 1]);
    path.closePath();
  }
  return path;
}

function render({ model, el }) {
  const { keys, annotator, panes: titles, decisions: choices, prefetch: ahead } = model.get("settings");
  const decisions = Object.fromEntries(choices.map((choice) => [choice.action, choice]));

  let state = null; // the kernel's last word: place, id, upcoming, figures
  let shown = null; // the item on screen; null while none is, and then decisions are ignored
  let shownAt = 0;
  let wantsFocus = model.get("settings").focus; // its name was just typed: the keys are for this
  let visited = false; // whether the widget has been scrolled into view once
  let pending = null; // the decision or undo that waits for the kernel's answer
  let item = null; // what draw() paints
  const cache = new Map(); // place -> decoded item
  const asked = new Set();
  let itemBytes = 0; // of the last item that came
  let painted = Promise.resolve(); // when the image that is due is on screen
  const look = { swapped: false, mask: 0, zoom: false, difference: false, pixels: false };
  let view = null; // { cx, cy, scale } in pixels of the image
  let [paneWidth, paneHeight] = [0, 300]; // of a image, CSS pixels; no width while it is hidden
  let flickerDown = 0;

  // ------------------------------------------------------------------ elements
  const count = make("span", { class: "count" });
  const figures = make("span", { class: "figures" });
  const save = make("span", { class: "save", role: "status" });
  const filled = make("div");
  const message = make("div", { class: "message", role: "alert" });
  const panes = titles.map((title, side) => {
    const canvas = make("canvas", { role: "img" });
    const caption = make("figcaption");
    return { side, title, canvas, caption, figure: make("figure", {}, caption, canvas) };
  });
  const veil = make("div", { class: "veil" });
  const note = make("input", {
    class: "note",
    type: "text",
    placeholder: "note for this image",
    "aria-label": "note for this image",
  });
  const buttons = {};
  const makeButton = (action, text, kind = "") => {
    const key = make("kbd", {}, keys[action] === " " ? "space" : keys[action]);
    const title = HELP[action] ?? text;
    const attributes = { type: "button", class: kind, title, "data-action": action };
    buttons[action] = make("button", { ...attributes, "aria-keyshortcuts": keys[action] }, key, text);
    buttons[action].addEventListener("click", (event) => perform(action, event.timeStamp));
    return buttons[action];
  };
  const hint = make("span", { class: "hint" }, "Keys are off: click here");
  const root = make(
    "div",
    { class: "rorem-widget rorem-annotator", tabindex: "0", "data-lm-suppress-shortcuts": "true", role: "application",
      "aria-label": "label removals by keyboard" },
    make("div", { class: "bar" }, count, figures, hint, save),
    make("div", { class: "track" }, filled),
    message,
    make("div", { class: "panes" }, ...panes.map((pane) => pane.figure), veil),
    make(
      "div",
      { class: "legend" },
      ...choices.map(({ action, text, kind }) => makeButton(action, text, `${kind} decision`)),
    ),
    make("div", { class: "legend" }, makeButton("undo", "Undo"), ...Object.entries(VIEW_ACTIONS).map(([a, text]) => makeButton(a, text)), note),
  );
  el.append(root);

  // ------------------------------------------------------------------ deciding
  function perform(action, pressedAt) {
    if (action in decisions) decide(decisions[action], pressedAt);
    else if (action === "undo") undo();
    else if (action === "note") note.focus();
    else if (item) change(action);
  }

  function decide({ label, reason }, pressedAt) {
    if (!shown || (pending && !pending.late)) return; // not on screen yet, or not yet saved
    const before = shownAt - pressedAt;
    if (before > 0 && before < STRAY_MS) return; // on screen now, but not when the key went down
    if (shown.error && label !== "skip") return say("This image cannot be shown: skip it.", true);
    const { place, id } = shown;
    const ms = Math.round(performance.now() - shownAt);
    const want = ask(state.upcoming.slice(ahead)); // what the window moves on to
    submit({ kind: "label", place, id, label, reason, note: note.value.trim(), ms, want, calm: ms > CALM_MS });
  }

  function undo() {
    if (pending && !pending.late) return;
    if (state && (shown || state.place === null)) submit({ kind: "undo", decided: state.decided });
  }

  function submit(content) {
    settle();
    const saving = setTimeout(() => setSave("saving", "saving …"), SOON_MS);
    const slow = setTimeout(() => {
      pending.late = true;
      setSave("failed", "NOT SAVED");
      say(
        "The kernel does not answer: it is busy, or gone. This image is not saved yet. " +
          "If the kernel was restarted, run the notebook again: it goes on at this image.",
        true,
      );
    }, SLOW_MS);
    pending = { timers: [saving, slow] };
    try {
      const isHurried = content.want?.length && !content.calm && itemBytes > SEGMENT;
      model.send(content, isHurried ? {} : { iopub: { status: hurry } });
    } catch (error) {
      settle();
      setSave("failed", "NOT SAVED");
      say(`Not saved: the notebook has lost its kernel (${error.message}). Run it again.`, true);
    }
  }

  // Jupyter's server leaves Nagle's algorithm on: the answer waits there until the page's system
  // has acknowledged the "busy" sent before it, which takes 40 ms unless something is sent: from
  // here, or from there a image behind the answer that fills a packet.
  function hurry(status) {
    if (status.content.execution_state === "busy" && pending) model.send({ kind: "nudge" });
  }

  function settle() {
    pending?.timers.forEach(clearTimeout);
    pending = null;
  }

  // ------------------------------------------------------------------ messages
  function onMessage(content, buffers) {
    if (content.kind === "item") return receiveItem(content, buffers);
    settle();
    if (content.kind === "failed") {
      setSave("failed", "NOT SAVED");
      return say(content.message, true);
    }
    const first = state === null;
    state = content;
    const last = state.last && (state.last.reason ?? PAST[state.last.label] ?? state.last.label);
    setSave("saved", state.notice || (last && !first ? `saved: ${last}` : "saved"));
    say("");
    showFigures();
    showPlace();
    if (item?.place !== state.place) prefetch(); // else once it is painted: the image goes first
  }

  async function receiveItem(content, buffers = []) {
    itemBytes = buffers.reduce((sum, buffer) => sum + buffer.byteLength, 0);
    await painted; // the image that is due goes first
    const blobs = (content.types ?? []).map((type, i) => new Blob([buffers[i]], { type }));
    const entry = { ...content, blobs, fitted: [], bitmaps: [], path: makePath(content.outline ?? []) };
    try {
      // Scaling is what drawing takes longest for: done ahead, and beside the page.
      const size = fitSize(content.size ?? [1, 1]);
      entry.fitted = await Promise.all(blobs.slice(0, panes.length).map((blob) => decode(blob, size)));
      if (entry.crop || look.zoom || look.pixels) wantWhole(entry);
    } catch (error) {
      entry.error = `a file of ${content.id} is truncated or damaged (${error.message})`;
    }
    asked.delete(content.place);
    if (cache.has(content.place)) return; // another view asked for it: this one keeps note and zoom
    cache.set(content.place, entry);
    if (state && content.place === state.place) showPlace();
  }

  // As training reads them: without the colour profiles that files may carry.
  function decode(blob, options) {
    return createImageBitmap(blob, { colorSpaceConversion: "none", resizeQuality: "high", ...options });
  }

  function fitSize([width, height]) {
    const scale = devicePixelRatio * fitScale(width, height);
    const [resizeWidth, resizeHeight] = [width, height].map((x) => Math.max(1, Math.round(x * scale)));
    return { resizeWidth, resizeHeight };
  }

  // Most decisions need the images as they fit the pane alone, and not in full.
  function wantWhole(entry) {
    entry.whole ??= Promise.all(entry.blobs.map((blob) => decode(blob))).then(
      (bitmaps) => {
        entry.bitmaps = bitmaps;
        if (entry === item) draw();
      },
      (error) => say(`${entry.id} cannot be shown in full: ${error.message}`, true),
    );
  }

  function forget(place) {
    const entry = cache.get(place);
    if (!entry || entry === item) return; // on screen
    [...entry.bitmaps, ...entry.fitted].forEach((bitmap) => bitmap.close());
    cache.delete(place);
  }

  function prefetch() {
    const near = state.place === null ? [] : [state.place, ...state.upcoming.slice(0, ahead)];
    const behind = [...cache.keys()].filter((p) => !near.includes(p)).sort((a, b) => a - b);
    behind.slice(0, -KEPT_BEHIND).forEach(forget);
    const places = ask(near);
    if (places.length) model.send({ kind: "want", places });
  }

  function ask(places) {
    const lacking = places.filter((place) => !cache.has(place) && !asked.has(place));
    lacking.forEach((place) => asked.add(place));
    return lacking;
  }

  // ------------------------------------------------------------------ showing
  function say(text, bad = false) {
    const wasBad = message.classList.contains("bad");
    message.textContent = text;
    message.classList.toggle("bad", bad);
    if (bad !== wasBad) measure(); // what went wrong takes its room from the images
  }

  function setSave(kind, text) {
    root.dataset.save = kind;
    save.textContent = text;
  }

  function showFigures() {
    const { done, own, wanted, accepted, rejected, skipped, rate, seconds_left: left, agreement } = state;
    count.textContent = `${done} of ${wanted}`;
    filled.style.width = `${Math.min(100, (100 * done) / Math.max(1, wanted))}%`;
    const parts = [];
    if (done >= wanted && state.place !== null) parts.push("complete: go on, or run the cells below");
    if (own < done) parts.push(`${own} yours`);
    if (accepted + rejected) parts.push(`${Math.round((100 * accepted) / (accepted + rejected))} % accepted`);
    if (skipped) parts.push(`${skipped} skipped`);
    if (rate) parts.push(`${Math.round(rate)} per minute`);
    if (left && state.place !== null) parts.push(left < 90 ? `${Math.round(left)} s left` : `${Math.round(left / 60)} min left`);
    if (agreement) parts.push(`agreement α ${agreement.alpha?.toFixed(2) ?? "–"} on ${agreement.n} shared`);
    figures.textContent = [...parts, annotator].join("  ·  ");
    figures.title = state.file;
  }

  function showPlace() {
    const finished = state.place === null;
    root.classList.toggle("done", finished);
    if (finished) {
      shown = item = null;
      root.dataset.place = root.dataset.id = "";
      const end = make("strong", {}, state.wanted ? "All labelled." : "There is nothing to label.");
      veil.replaceChildren(end, make("span", {}, `Run the cells below, or press ${keys.undo} to take back the last decision.`));
      return;
    }
    const next = cache.get(state.place);
    if (next && shown === next) return;
    shown = null;
    root.dataset.place = "";
    root.classList.toggle("waiting", !next);
    if (!next) return;
    item = next;
    Object.assign(look, { swapped: false, difference: false });
    flickerDown = 0;
    startNote(state.note);
    view = null;
    draw();
    if (next.error) say(`This image cannot be shown, skip it: ${next.error}`, true);
    if (!visited) bringIntoView();
    if (wantsFocus && document.activeElement === document.body) root.focus({ preventScroll: true });
    wantsFocus = false;
    const isDue = () => item === next && state.place === next.place;
    painted = Promise.resolve(next.whole)
      .then(beforePaint)
      .then(() => {
        if (!isDue()) return;
        shown = next;
        shownAt = performance.now();
        return afterPaint();
      })
      .then(() => {
        if (!isDue()) return;
        root.dataset.place = next.place;
        root.dataset.id = next.id;
        prefetch();
      });
  }

  // Taken out and put back: else the browser's undo and redo write old notes into this image's.
  function startNote(text) {
    const isTyping = document.activeElement === note;
    note.value = text;
    note.parentElement.append(note);
    if (isTyping) note.focus();
  }

  // "Run all cells" leaves the reader at the notebook's end. Scrolling is as far as it goes: the
  // focus is never taken, what is typed elsewhere must not become a label.
  function bringIntoView() {
    visited = true;
    const active = document.activeElement;
    if (active?.closest("input, textarea, [contenteditable=true]")) return;
    root.scrollIntoView({ block: "nearest" });
    setTimeout(() => root.scrollIntoView({ block: "nearest" }), 600); // the cells above have settled
  }

  function change(action) {
    if (action === "mask") look.mask = (look.mask + 1) % MASK_MODES.length;
    else if (action === "flicker") look.swapped = !look.swapped;
    else look[action] = !look[action];
    if (action === "zoom") view = null;
    draw();
  }

  function moveView(dx, dy) {
    view.cx -= dx / view.scale; // CSS pixels
    view.cy -= dy / view.scale;
    draw();
  }

  function zoomView(factor, x = 0, y = 0) {
    const scale = Math.min(64, Math.max(0.05, view.scale * factor));
    view.cx += x / view.scale - x / scale; // what is at x, y from the pane's middle stays there
    view.cy += y / view.scale - y / scale;
    view.scale = scale;
    draw();
  }

  function fitScale(width, height) {
    return Math.min(paneWidth / width, paneHeight / height);
  }

  function fitView() {
    let [x0, y0, x1, y1] = [0, 0, ...item.size];
    if (look.zoom) {
      const margin = 0.3 * Math.max(item.box[2] - item.box[0], item.box[3] - item.box[1]) + 2;
      x0 = Math.max(0, item.box[0] - margin);
      y0 = Math.max(0, item.box[1] - margin);
      x1 = Math.min(item.size[0], item.box[2] + margin);
      y1 = Math.min(item.size[1], item.box[3] + margin);
    }
    return { cx: (x0 + x1) / 2, cy: (y0 + y1) / 2, scale: fitScale(x1 - x0, y1 - y0) };
  }

  // As tall as the notebook's visible part allows, so that images and legend are seen together.
  // In VS Code the window is as tall as the whole notebook: there the screen sets the limit.
  function measure() {
    const port = root.closest(".jp-WindowedPanel-outer, .jp-LinkedOutputView");
    const extra = message.classList.contains("bad") ? 0 : message.offsetHeight;
    const rest = root.offsetHeight - panes[0].canvas.offsetHeight - extra;
    const visible = Math.min(window.innerHeight - 40, screen.availHeight - EDITOR_HEIGHT);
    const free = (port?.clientHeight || visible) - rest - 12;
    paneWidth = panes[0].figure.clientWidth;
    paneHeight = Math.round(Math.min(paneWidth, Math.max(220, free)));
    view = null;
    draw();
  }

  function draw() {
    const ratio = devicePixelRatio;
    for (const { side, title, canvas, caption, figure } of panes) {
      canvas.style.height = `${paneHeight}px`;
      const [w, h] = [Math.round(paneWidth * ratio), Math.round(paneHeight * ratio)];
      if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
      const context = canvas.getContext("2d");
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.clearRect(0, 0, w, h);
      if (!item || item.error || !paneWidth) continue;
      view ??= fitView();
      const scale = view.scale * ratio;
      const [left, top] = [w / 2 - view.cx * scale, h / 2 - view.cy * scale].map(Math.round);
      context.setTransform(scale, 0, 0, scale, left, top);
      context.imageSmoothingEnabled = !look.pixels;
      context.imageSmoothingQuality = "high";
      const showsSource = side === 0 || look.swapped;
      paint(context, showsSource ? 0 : side, scale);
      if (side && look.difference) paintDifference(context, look.swapped ? side : 0, scale, canvas);
      else paintMask(context, side === 0, scale, ratio);
      caption.textContent = side && look.difference ? "difference × 4" : showsSource ? "source" : title;
      canvas.setAttribute("aria-label", caption.textContent);
      figure.classList.toggle("swapped", side > 0 && (look.swapped || look.difference));
    }
    for (const action of ["zoom", "difference", "pixels"]) buttons[action].setAttribute("aria-pressed", look[action]);
    buttons.flicker.setAttribute("aria-pressed", look.swapped);
    buttons.mask.setAttribute("aria-pressed", look.mask !== 0);
    buttons.mask.lastChild.textContent = `Mask: ${MASK_MODES[look.mask]}`;
  }

  function paint(context, which, scale) {
    const [width, height] = item.size;
    const fitted = item.fitted[which];
    if (fitted.width === Math.round(width * scale) && !look.pixels) {
      context.save();
      const { e: left, f: top } = context.getTransform();
      context.setTransform(1, 0, 0, 1, left, top); // pixel for pixel, else it would be scaled again
      context.drawImage(fitted, 0, 0);
      context.restore();
    } else {
      wantWhole(item);
      context.drawImage(item.bitmaps[which] ?? fitted, 0, 0, width, height);
    }
    if (item.crop && item.bitmaps.length && scale > item.bitmaps[which].width / width) {
      const [x0, y0, x1, y1] = item.crop; // full resolution, only where it was sent
      context.drawImage(item.bitmaps[which + panes.length], x0, y0, x1 - x0, y1 - y0);
    }
  }

  function paintDifference(context, which, scale, canvas) {
    context.globalCompositeOperation = "difference";
    paint(context, which, scale);
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.globalCompositeOperation = "lighter";
    context.drawImage(canvas, 0, 0);
    context.drawImage(canvas, 0, 0);
    context.globalCompositeOperation = "source-over";
  }

  function paintMask(context, isSource, scale, ratio) {
    const mode = MASK_MODES[look.mask];
    if (mode === "off" || (mode !== "both" && !isSource)) return;
    if (mode === "fill") {
      context.fillStyle = "rgba(255, 0, 110, 0.45)";
      context.fill(item.path, "evenodd");
    }
    for (const [colour, width] of [["rgba(0, 0, 0, 0.75)", 3.5], ["#ffe14d", 1.5]]) {
      context.strokeStyle = colour; // dark under bright: seen on any background
      context.lineWidth = (width * ratio) / scale;
      context.stroke(item.path);
    }
  }

  // ------------------------------------------------------------------ keys, mouse
  const byKey = Object.fromEntries(Object.entries(keys).map(([action, key]) => [key, action]));
  byKey[" "] ??= "flicker";

  function findAction(event) {
    const key = event.key.toLowerCase();
    if (key in byKey) return byKey[key];
    // Of letters that are not Latin, and of digits that need Shift, as in France: the same place.
    // Keys with a longer name are no letters: without NumLock a pad's 2 is "arrowdown".
    const isPlain = /^[\x20-\x7e]$/.test(key) && !event.code.startsWith("Digit");
    return isPlain || key.length > 1 ? undefined : byKey[event.code.replace(/^(Key|Digit)/, "").toLowerCase()];
  }

  function onKeyDown(event) {
    event.stopPropagation(); // a notebook's own shortcuts (d d deletes a cell) stay out of this
    if (event.ctrlKey || event.metaKey || event.altKey) {
      if (event.key.toLowerCase() === "s") event.preventDefault(); // labels are saved anyway
      return;
    }
    if (event.target === note) {
      if (event.isComposing || (event.key !== "Escape" && event.key !== "Enter")) return;
      if (event.key === "Escape") note.value = "";
      root.focus({ preventScroll: true });
      return;
    }
    if (event.target.tagName === "BUTTON" && (event.key === " " || event.key === "Enter")) {
      if (event.repeat) event.preventDefault(); // a held Enter would click again and again
      return;
    }
    const action = findAction(event);
    const move = VIEW_KEYS[event.key];
    if (!action && !(move && view)) return;
    event.preventDefault();
    if (!action) return "factor" in move ? zoomView(move.factor) : moveView(move.dx * paneHeight, move.dy * paneHeight);
    if (event.repeat) return;
    if (action === "flicker") flickerDown = performance.now();
    perform(action, event.timeStamp);
  }

  function onKeyUp(event) {
    event.stopPropagation();
    if (event.target === note || findAction(event) !== "flicker" || !flickerDown || !item) return;
    if (performance.now() - flickerDown > HOLD_MS) change("flicker");
    flickerDown = 0;
  }

  root.addEventListener("focusin", (event) => {
    if (!root.contains(event.relatedTarget)) root.scrollIntoView({ block: "nearest" });
  });
  root.addEventListener("keydown", onKeyDown);
  root.addEventListener("keyup", onKeyUp);
  root.addEventListener("mousedown", (event) => {
    if (event.target === note || message.contains(event.target)) return;
    event.preventDefault(); // a clicked button does not keep the focus: the next Space is no click
    root.focus({ preventScroll: true });
  });
  for (const { canvas } of panes) {
    canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
    canvas.addEventListener("pointermove", (event) => {
      if (!view || !(event.buttons & 1)) return;
      moveView(event.movementX, event.movementY);
    });
    canvas.addEventListener(
      "wheel",
      (event) => {
        if (!view || !root.contains(document.activeElement)) return;
        event.preventDefault();
        const area = canvas.getBoundingClientRect();
        const [x, y] = [event.clientX - area.left - area.width / 2, event.clientY - area.top - area.height / 2];
        zoomView(Math.exp(-event.deltaY / 400), x, y);
      },
      { passive: false },
    );
  }

  const resized = new ResizeObserver(measure);
  resized.observe(root.querySelector(".bar"));
  window.addEventListener("resize", measure);
  model.on("msg:custom", onMessage);
  setSave("saving", "opening …");
  model.send({ kind: "ready" });

  return () => {
    model.off("msg:custom", onMessage);
    resized.disconnect();
    window.removeEventListener("resize", measure);
    settle();
    item = null;
    [...cache.keys()].forEach(forget);
  };
}

export default { render };
