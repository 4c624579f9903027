"use strict";
// The slice viewer: unpacks the volumes and NiiVue from the page itself, and ties the controls to it.
(function () {
  const find = (id) => document.getElementById(id);
  const scene = JSON.parse(find("scene").textContent);
  const PLANES = { axial: 0, coronal: 1, sagittal: 2, multi: 3 };
  const AXES = { axial: 2, coronal: 1, sagittal: 0 };
  // Okabe-Ito orange and blue; viridis and magma, whose brightness rises throughout
  const COLOURS = {
    mask: { R: [230, 230], G: [159, 159], B: [0, 0], A: [0, 255], I: [0, 255] },
    ventricles: { R: [86, 86], G: [180, 180], B: [233, 233], A: [0, 255], I: [0, 255] },
    probability: {
      R: [68, 68, 59, 33, 94, 253], G: [1, 1, 82, 145, 201, 231], B: [84, 84, 139, 140, 98, 37],
      A: [0, 0, 170, 220, 255, 255], I: [0, 12, 64, 128, 192, 255],
    },
    uncertainty: {
      R: [0, 0, 81, 183, 252, 252], G: [0, 0, 18, 55, 137, 253], B: [4, 4, 124, 121, 97, 191],
      A: [0, 0, 170, 220, 255, 255], I: [0, 12, 64, 128, 192, 255],
    },
  };
  const CROSSHAIR_MM = 0.5;
  let viewer = null;
  let pending = false;

  function bytesOf(id) {
    const element = find(id);
    const text = atob(element.textContent);
    element.remove(); // megabytes that nobody reads again
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return bytes;
  }

  function unpacked(id) {
    const stream = new Blob([bytesOf(id)]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream);
  }

  async function loadProgram() {
    const script = document.createElement("script");
    script.textContent = await unpacked("program").text();
    document.head.append(script); // the page's policy knows its hash
    return window.niivue;
  }

  async function volumeOf(NVImage, layer) {
    const data = await unpacked("data-" + layer.name).arrayBuffer();
    const scan = layer.name === "flair";
    const [low, high] = scan ? scene.window : [layer.low, layer.high];
    const image = await NVImage.new(data, layer.name + ".nii", scan ? "gray" : layer.name, 1.0,
      null, low, high);
    image.colorbarVisible = false;
    return image;
  }

  async function start() {
    const canvas = find("canvas");
    if (!document.createElement("canvas").getContext("webgl2")) {
      throw new Error("This browser offers no WebGL 2, which the interactive viewer needs.");
    }
    if (!("DecompressionStream" in window)) {
      throw new Error("This browser is too old for the interactive viewer.");
    }
    const { Niivue, NVImage } = await loadProgram();
    viewer = new Niivue({
      logLevel: "error",
      loadingText: "",
      backColor: [0, 0, 0, 1],
      crosshairColor: [0.34, 0.71, 0.91, 0.75],
      crosshairWidth: CROSSHAIR_MM,
      crosshairWidthUnit: "mm",
      crosshairGap: 16, // leaves the lesion in its middle uncovered
      showAllOrientationMarkers: true,
      fontColor: [0.85, 0.87, 0.9, 1],
      fontMinPx: 14,
      isRadiologicalConvention: true,
      dragAndDropEnabled: false,
      multiplanarShowRender: 0,
      multiplanarPadPixels: 4,
      scrollRequiresFocus: true,
      viewModeHotKey: "", clipPlaneHotKey: "", cycleClipPlaneHotKey: "",
    });
    find("stage").hidden = false;
    await viewer.attachToCanvas(canvas);
    insetLetters();
    for (const [name, map] of Object.entries(COLOURS)) viewer.addColormap(name, map);
    for (const layer of scene.layers) viewer.addVolume(await volumeOf(NVImage, layer));
    viewer.onLocationChange = showPlace;
    viewer.onIntensityChange = showWindow; // NiiVue's own gestures: right drag, double click
    connect();
    resetView();
    find("fallback").remove();
    document.documentElement.dataset.viewer = "ready";
  }

  // NiiVue writes the letters of the directions flush with the edges, where they look cut off.
  function insetLetters() {
    const inset = 4 * window.devicePixelRatio;
    for (const [side, dx, dy] of [["Above", 0, -1], ["Left", -1, 0], ["Right", 1, 0]]) {
      const name = "drawText" + side;
      const draw = viewer[name].bind(viewer);
      viewer[name] = ([x, y], ...rest) => draw([x + inset * dx, y + inset * dy], ...rest);
    }
  }

  const plane = () => document.querySelector("input[name=plane]:checked").value;
  const mainPlane = () => (plane() === "multi" ? scene.plane : plane());
  const voxel = () => viewer.frac2vox(viewer.scene.crosshairPos);

  function redraw() {
    if (pending) return; // sliders move faster than volumes are coloured
    pending = true;
    requestAnimationFrame(() => {
      pending = false;
      viewer.updateGLVolume();
    });
  }

  function setWindow() {
    const level = Number(find("level").value);
    const width = Number(find("width").value);
    viewer.volumes[0].cal_min = level - width / 2;
    viewer.volumes[0].cal_max = level + width / 2;
    tellWindow(level, width);
    redraw();
  }

  function showWindow() {
    const { cal_min: low, cal_max: high } = viewer.volumes[0];
    find("level").value = (low + high) / 2;
    find("width").value = high - low;
    tellWindow((low + high) / 2, high - low);
  }

  function tellWindow(level, width) {
    find("level-value").textContent = format(level);
    find("width-value").textContent = format(width);
  }

  const format = (value) => String(Number(value.toPrecision(3)));

  function setOverlays() {
    for (const [index, layer] of scene.layers.entries()) {
      if (index === 0) continue;
      const slider = find("opacity-" + layer.name);
      slider.nextElementSibling.textContent = slider.value + " %";
      const shown = find("show-" + layer.name).checked;
      viewer.volumes[index].opacity = shown ? Number(slider.value) / 100 : 0;
    }
    redraw();
  }

  function setPlane() {
    viewer.setSliceType(PLANES[plane()]);
    const slider = find("slice");
    slider.max = viewer.volumes[0].dimsRAS[AXES[mainPlane()] + 1] - 1;
    showPlace();
  }

  function setSlice(index) {
    const axis = AXES[mainPlane()];
    const here = voxel();
    const last = viewer.volumes[0].dimsRAS[axis + 1] - 1;
    here[axis] = Math.min(last, Math.max(0, index));
    moveTo(viewer.vox2frac(here));
  }

  function moveTo(fraction) {
    viewer.scene.crosshairPos = fraction;
    viewer.createOnLocationChange();
    viewer.drawScene();
  }

  function showPlace() {
    const here = viewer.frac2mm(viewer.scene.crosshairPos, 0, true);
    const axis = AXES[mainPlane()];
    const slice = voxel()[axis];
    find("slice").value = slice;
    find("slice-value").textContent = `${slice + 1} of ${Number(find("slice").max) + 1}`;
    const mm = Array.from(here.slice(0, 3), (value) => value.toFixed(0).replace("-0", "0"));
    const parts = [`right ${mm[0]}, anterior ${mm[1]}, superior ${mm[2]} mm`];
    for (const [index, layer] of scene.layers.entries()) {
      const image = viewer.volumes[index];
      const at = image.mm2vox(Array.from(here));
      const value = image.getValue(at[0], at[1], at[2]);
      if (layer.name === "flair") parts.push("FLAIR " + format(value));
      if (layer.name === "probability") parts.push("probability " + value.toFixed(2));
      if (layer.name === "uncertainty") parts.push("SD " + value.toFixed(2));
    }
    find("place").textContent = parts.join(" · ");
  }

  function resetView() {
    const [low, high] = scene.window;
    const range = scene.layers[0].high - scene.layers[0].low;
    for (const [id, least, most, value] of [
      ["level", scene.layers[0].low, scene.layers[0].high, (low + high) / 2],
      ["width", range / 100, range * 1.5, high - low],
    ]) {
      Object.assign(find(id), { min: least, max: most, step: range / 200 });
      find(id).value = value;
    }
    for (const box of document.querySelectorAll(".overlays input")) {
      if (box.type === "checkbox") box.checked = box.defaultChecked;
      else box.value = box.defaultValue;
    }
    document.querySelector(`input[name=plane][value=${scene.plane}]`).checked = true;
    find("crosshair").checked = true;
    viewer.setPan2Dxyzmm([0, 0, 0, 1]);
    setCrosshair();
    setWindow();
    setOverlays();
    setPlane();
    const first = document.querySelector("tr[data-focus]");
    if (first) showLesion(first);
    else moveTo([0.5, 0.5, 0.5]);
  }

  function setCrosshair() {
    viewer.setCrosshairWidth(find("crosshair").checked ? CROSSHAIR_MM : 0);
  }

  function showLesion(row) {
    for (const other of row.parentElement.rows) {
      other.classList.toggle("current", other === row);
      const button = other.querySelector("button.goto");
      button.tabIndex = other === row ? 0 : -1;
      button.setAttribute("aria-current", other === row);
    }
    if (viewer) moveTo(viewer.mm2frac(row.dataset.focus.split(" ").map(Number), 0, true));
  }

  function stepLesion(from, step) {
    const rows = Array.from(document.querySelectorAll("tr[data-focus]"));
    const row = rows[rows.indexOf(from) + step];
    if (row) {
      showLesion(row);
      const box = row.closest(".scroll");
      const top = row.offsetTop - row.parentElement.offsetTop;
      if (top < box.scrollTop || top > box.scrollTop + box.clientHeight - 80) {
        box.scrollTop = top - 80;
      }
    }
    return row;
  }

  function connect() {
    for (const input of document.querySelectorAll("input[name=plane]")) {
      input.addEventListener("change", setPlane);
    }
    for (const id of ["level", "width"]) find(id).addEventListener("input", setWindow);
    for (const input of document.querySelectorAll(".overlays input")) {
      input.addEventListener("input", setOverlays);
    }
    find("slice").addEventListener("input", (event) => setSlice(Number(event.target.value)));
    find("crosshair").addEventListener("change", setCrosshair);
    find("reset").addEventListener("click", resetView);
    // in the capture phase, before NiiVue's own keys
    find("canvas").parentElement.addEventListener("keydown", onCanvasKey, true);
    find("canvas").parentElement.addEventListener("keyup", (e) => e.stopPropagation(), true);
  }

  function onCanvasKey(event) {
    event.stopPropagation();
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const slice = voxel()[AXES[mainPlane()]];
    const current = document.querySelector("tr.current");
    const actions = {
      ArrowUp: () => setSlice(slice + 1),
      ArrowDown: () => setSlice(slice - 1),
      PageUp: () => setSlice(slice + 5),
      PageDown: () => setSlice(slice - 5),
      Home: () => setSlice(0),
      End: () => setSlice(Infinity),
      ArrowRight: () => stepLesion(current, 1),
      ArrowLeft: () => stepLesion(current, -1),
      m: () => find("show-mask").click(),
    };
    const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (action) {
      event.preventDefault();
      action();
    }
  }

  const table = find("lesion-table");
  if (table) {
    table.tBodies[0].addEventListener("click", (event) => showLesion(event.target.closest("tr")));
    table.tBodies[0].addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const row = stepLesion(event.target.closest("tr"), step);
      if (row) row.querySelector("button.goto").focus();
    });
  }

  start().catch((error) => {
    find("stage").hidden = true;
    find("fallback").textContent = error.message + " The montage below shows the same outlines.";
    document.documentElement.dataset.viewer = "missing";
  });
})();
