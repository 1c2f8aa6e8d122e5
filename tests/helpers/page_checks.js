// Findings of what axe-core checks too, on the page as it is shown: an empty list where all is well.
(() => {
  const found = [];
  const say = (rule, node) => found.push(`${rule}: ${(node.outerHTML || "").slice(0, 90)}`);
  const all = (selector) => [...document.querySelectorAll(selector)];

  if (!document.documentElement.lang) say("lang", document.documentElement);
  if (!document.title) say("title", document.head);
  if (!document.querySelector('meta[name="viewport"]')) say("viewport", document.head);
  for (const [landmark, count] of [["main", 1], ["header", 1], ["footer", 1], ["h1", 1]])
    if (all(landmark).length !== count) say(`${count} ${landmark}`, document.body);

  let level = 0;
  for (const heading of all("h1, h2, h3, h4")) {
    const now = Number(heading.tagName[1]);
    if (now > level + 1) say("heading order", heading);
    level = now;
  }
  for (const image of all("img")) if (image.getAttribute("alt") === null) say("alt", image);
  for (const image of all('[role="img"]')) if (!image.getAttribute("aria-label")) say("label", image);
  for (const head of all("th")) if (!["row", "col"].includes(head.scope)) say("scope", head);
  const ids = all("[id]").map((node) => node.id);
  for (const id of new Set(ids)) if (ids.filter((other) => other === id).length > 1) found.push(`one id: ${id}`);
  for (const node of all("*")) {
    const scrolls = ["auto", "scroll"].includes(getComputedStyle(node).overflowX) && node.scrollWidth > node.clientWidth;
    if (scrolls && node.tabIndex !== 0) say("scrolled by keys", node);
  }
  const names = all("section, nav, [role='region']").map(
    (node) => node.getAttribute("aria-label") || document.getElementById(node.getAttribute("aria-labelledby"))?.textContent,
  );
  for (const name of names) if (!name || names.filter((other) => other === name).length > 1) found.push(`landmark: ${name}`);
  for (const link of all('a[href^="#"]')) if (!document.getElementById(link.hash.slice(1))) say("target", link);

  // Contrast of all text with what is behind it, as WCAG 2 computes it.
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map((k) => top[k] * top[3] + below[k] * (1 - top[3])).concat(1);
  const behind = (node) =>
    node === null ? [255, 255, 255, 1] : over(rgba(getComputedStyle(node).backgroundColor), behind(node.parentElement));
  const light = (colour) => {
    const [r, g, b] = colour.map((part) => part / 255).map((p) => (p <= 0.04045 ? p / 12.92 : ((p + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || ["STYLE", "SCRIPT", "style", "title"].includes(node.tagName)) continue;
    if (!node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const below = behind(node);
    const ink = over(rgba(node.closest("svg") ? style.fill : style.color), below);
    const [dark, bright] = [light(ink), light(below)].sort((a, b) => a - b);
    const size = parseFloat(style.fontSize);
    const least = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
    const contrast = (bright + 0.05) / (dark + 0.05);
    if (contrast < least) say(`contrast ${contrast.toFixed(2)}`, node);
  }
  return found;
})()
