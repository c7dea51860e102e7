// What is wrong with a page as it is drawn now? A list of {kind, where, what}; the expression is the list.
(() => {
  const SMALLEST = 9, CONTRAST = 4.5, found = [];
  const width = document.documentElement.clientWidth;
  const name = (node) => {
    const said = (node.textContent || "").trim().replace(/\s+/g, " ").slice(0, 40);
    const kind = node.getAttribute("class");
    return node.tagName.toLowerCase() + (kind ? "." + kind.trim().replace(/\s+/g, ".") : "") + " '" + said + "'";
  };
  const fault = (kind, node, what) => found.push({ kind, where: name(node), what });
  const scrolls = (node) => ["auto", "scroll"].includes(getComputedStyle(node).overflowX);
  const inScroll = (node) => { for (let n = node; n && n !== document.body; n = n.parentElement) if (scrolls(n)) return n; return null; };
  const shown = (node) => {
    const box = node.getBoundingClientRect(), style = getComputedStyle(node);
    return box.width > 0 && box.height > 0 && style.visibility !== "hidden" && style.opacity !== "0";
  };

  const said = (node) => { // a line before it that tells
    const before = node.previousElementSibling;
    return before !== null && before.classList.contains("hint") && shown(before);
  };

  // 1. nothing is wider than the window but what can be scrolled, and that says so and can be reached by keys
  if (document.documentElement.scrollWidth > width)
    found.push({ kind: "overflow", where: "page", what: document.documentElement.scrollWidth + " of " + width + " px" });
  for (const node of document.body.querySelectorAll("*")) {
    if (!shown(node)) continue;
    const box = node.getBoundingClientRect(), style = getComputedStyle(node);
    if (!inScroll(node) && (box.right > width + 1 || box.left < -1)) fault("overflow", node, Math.round(box.right) + " of " + width + " px");
    if (["hidden", "clip"].includes(style.overflowX) && node.scrollWidth > node.clientWidth + 1 && !node.hasAttribute("data-cut"))
      fault("cut", node, node.scrollWidth + " of " + node.clientWidth + " px");
    if (scrolls(node) && node.scrollWidth > node.clientWidth + 1 && (node.tabIndex < 0 || !said(node)))
      fault("no cue", node, "can be scrolled, and neither shows it nor can be reached by keys");
    if (["TD", "TH"].includes(node.tagName) && !node.children.length) { // a column so narrow that words fall apart
      const words = node.textContent.trim().split(/[\s-]+/).length, lines = box.height / (parseFloat(style.lineHeight) || 1.5 * parseFloat(style.fontSize));
      const own = document.createRange();
      own.selectNodeContents(node);
      if (own.getClientRects().length > words + 1 && lines > 3) fault("squeezed", node, own.getClientRects().length + " lines for " + words + " words");
    }
    if (node.matches("caption, figcaption, .caption, .hint") && box.right > width + 1) fault("cut", node, Math.round(box.right) + " of " + width + " px");
  }

  // 2. and 3. every text: its size as drawn, and its contrast against what lies beneath it
  const colours = (text) => [...text.matchAll(/rgba?\(([^)]+)\)|color\(srgb ([^)]+)\)/g)].map((match) => {
    const parts = (match[1] || match[2]).split(/[\s,\/]+/).filter(Boolean).map(Number);
    const scale = match[2] ? 255 : 1;
    return { rgb: parts.slice(0, 3).map((part) => part * scale), alpha: parts.length > 3 ? parts[3] : 1 };
  });
  const over = (top, below) => top.rgb.map((value, i) => value * top.alpha + below[i] * (1 - top.alpha));
  const luminance = (rgb) => {
    const linear = rgb.map((value) => value / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const ratio = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
  const page = () => {
    for (const node of [document.body, document.documentElement]) {
      const own = colours(getComputedStyle(node).backgroundColor)[0];
      if (own && own.alpha > 0) return own.rgb;
    }
    return matchMedia("(prefers-color-scheme: dark)").matches && getComputedStyle(document.documentElement).colorScheme.includes("dark") ? [18, 18, 18] : [255, 255, 255];
  };
  // every colour that may lie beneath a point of a node: a gradient or hatch has several
  const beneath = (node, x, y) => {
    const stack = document.elementsFromPoint(x, y), at = stack.indexOf(node), around = [];
    for (let each = node; each; each = each.parentElement) around.push(each);
    const layers = [];
    for (const each of at < 0 ? around : stack.slice(at)) { // what is scrolled out of sight lies on its ancestors
      const style = getComputedStyle(each);
      const shape = each instanceof SVGElement && !["svg", "text", "tspan", "g"].includes(each.tagName);
      if (shape && style.fill !== "none") {
        const paint = colours(style.fill);
        if (!paint.length) return null;
        layers.push(paint.map((one) => ({ rgb: one.rgb, alpha: one.alpha * style.fillOpacity })));
      } else if (!(each instanceof SVGElement)) {
        const drawn = colours(style.backgroundImage);
        if (drawn.length) layers.push(drawn);
        layers.push(colours(style.backgroundColor));
      }
      if (layers.length && layers[layers.length - 1].length && layers[layers.length - 1].every((one) => one.alpha === 1)) break;
    }
    let grounds = [page()];
    for (const layer of layers.reverse()) if (layer.length) grounds = grounds.flatMap((ground) => layer.map((one) => over(one, ground)));
    return grounds;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement;
    if (!text.data.trim() || ["SCRIPT", "STYLE", "TITLE", "DESC", "OPTION", "NOSCRIPT"].includes(node.tagName.toUpperCase()) || !shown(node)) continue;
    const style = getComputedStyle(node);
    let size = parseFloat(style.fontSize);
    if (node instanceof SVGGraphicsElement) { const m = node.getScreenCTM(); size *= Math.hypot(m.a, m.b); }
    if (size < SMALLEST - 0.01) fault("small", node, size.toFixed(1) + " px");
    const range = document.createRange();
    range.selectNodeContents(text);
    const boxes = [...range.getClientRects()].filter((box) => box.width > 0 && box.height > 0);
    if (!boxes.length) continue;
    const box = boxes[0], ink = colours(node instanceof SVGElement ? style.fill : style.color)[0];
    const grounds = beneath(node, box.left + box.width / 2, box.top + box.height / 2);
    if (!ink || grounds === null) { fault("contrast", node, "drawn on or by something without a colour"); continue; }
    const worst = Math.min(...grounds.map((ground) => ratio(over({ rgb: ink.rgb, alpha: ink.alpha * Number(style.opacity) }, ground), ground)));
    if (worst < CONTRAST - 0.005) fault("contrast", node, worst.toFixed(2) + ":1");
  }
  return found;
})()
