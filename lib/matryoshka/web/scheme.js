// Light or dark: what the system says, until the reader chooses.
const root = document.documentElement;
const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
const schemeButton = document.getElementById("scheme");
const redraw = [];

function isDark() {
  return root.dataset.scheme ? root.dataset.scheme === "dark" : systemIsDark.matches;
}

function showScheme() {
  schemeButton.textContent = isDark() ? "Light" : "Dark";
  schemeButton.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
  for (const draw of redraw) draw();
}

function remembered(value) {
  try {
    if (value) localStorage.setItem("scheme", value);
    return localStorage.getItem("scheme");
  } catch {
    return null; // storage may be forbidden: the choice then lasts as long as the page
  }
}

if (["light", "dark"].includes(remembered())) root.dataset.scheme = remembered();
schemeButton.hidden = false;
schemeButton.addEventListener("click", () => {
  root.dataset.scheme = isDark() ? "light" : "dark";
  remembered(root.dataset.scheme);
  showScheme();
});
systemIsDark.addEventListener("change", showScheme);
showScheme();

// Which part of the report is being read.
const links = new Map([...document.querySelectorAll(".bar a")].map((link) => [link.hash.slice(1), link]));
const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const [key, link] of links) {
        if (key === entry.target.id) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    }
  },
  { rootMargin: "-20% 0px -70% 0px" },
);
for (const part of document.querySelectorAll("main > section")) watcher.observe(part);

const data = JSON.parse(document.getElementById("data").textContent);

// Text of documents goes into the page by this alone: never as HTML.
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
