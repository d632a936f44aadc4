"use strict";
// Live pages: when the study's record changes, the parts marked data-refresh are fetched anew and put in place.
(() => {
  const live = () => document.body.dataset.live === "true";
  let known = null;

  const stamp = async () => (await (await fetch("/stamp?study=" + encodeURIComponent(document.body.dataset.study))).json()).stamp;

  const refresh = async () => {
    const page = new DOMParser().parseFromString(await (await fetch(location.href)).text(), "text/html");
    for (const part of document.querySelectorAll("[data-refresh]")) {
      const fresh = page.querySelector('[data-refresh="' + part.dataset.refresh + '"]');
      if (!fresh || fresh.innerHTML === part.dataset.shown) continue;
      const open = [...part.querySelectorAll("details")].map((each) => each.open);
      const scrolled = [...part.querySelectorAll(".scroll")].map((each) => [each.scrollLeft, each.scrollTop]);
      const focused = part.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
      part.dataset.shown = fresh.innerHTML;
      part.replaceChildren(...fresh.childNodes);
      part.querySelectorAll("details").forEach((each, i) => { if (i in open) each.open = open[i]; });
      part.querySelectorAll(".scroll").forEach((each, i) => { if (i in scrolled) [each.scrollLeft, each.scrollTop] = scrolled[i]; });
      if (focused) part.querySelector('[href="' + CSS.escape(focused) + '"]')?.focus();
    }
    document.body.dataset.live = page.body.dataset.live;
    document.body.dataset.refreshed = String(Number(document.body.dataset.refreshed || 0) + 1);
    if (window.figures) window.figures.all();
  };

  const watch = async () => {
    try {
      if (live() && !document.hidden) {
        const now = await stamp();
        if (known !== null && now !== known) await refresh();
        known = now;
      }
    } catch {
      // the server is away; the next round tries again
    }
    setTimeout(watch, 1500);
  };

  addEventListener("DOMContentLoaded", () => {
    for (const form of document.querySelectorAll("form[data-auto]")) {
      // In place, so that the focus stays where a keyboard has put it; the address follows, so that it can be passed on.
      const apply = () => {
        history.replaceState(null, "", form.getAttribute("action") + "?" + new URLSearchParams(new FormData(form)));
        refresh();
      };
      let waiting = 0;
      form.addEventListener("change", () => {
        clearTimeout(waiting);
        waiting = setTimeout(apply, 300);
      });
      form.addEventListener("submit", (event) => {
        event.preventDefault();
        clearTimeout(waiting);
        apply();
      });
    }
    for (const slider of document.querySelectorAll("[data-output]")) {
      slider.addEventListener("input", () => (document.getElementById(slider.dataset.output).textContent = slider.value));
    }
    watch();
  });
})();
