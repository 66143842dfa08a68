// Runs before the first paint, so that a dark room never sees a white flash.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    const wish = localStorage.getItem("anomalyst-theme") || "auto";
    const shown = wish === "auto" ? (dark.matches ? "dark" : "light") : wish;
    document.documentElement.dataset.theme = shown;
  };
  dark.addEventListener("change", apply);
  addEventListener("anomalyst-theme", apply);
  apply();
})();
