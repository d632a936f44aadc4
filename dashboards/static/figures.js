"use strict";
// Draws every element with data-figure from the JSON beside it, in the colours of the theme, and again when the theme changes.
window.figures = (() => {
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const coloured = (value) => {
    if (typeof value === "string") return value.startsWith("@") ? css("--figure-" + value.slice(1)) || "#888" : value;
    if (Array.isArray(value)) return value.map(coloured);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, coloured(v)]));
    return value;
  };

  const themed = (layout, width) => {
    const narrow = width < 520;
    const ink = css("--ink"), line = css("--line");
    const size = narrow ? 11 : 13;
    const titled = (own) => ({ ...own, title: { standoff: 8, ...own.title, font: { size } } });
    const axis = (own) => titled({ gridcolor: line, linecolor: line, zerolinecolor: line, tickcolor: line, ...own });
    return {
      font: { color: ink, size, family: getComputedStyle(document.body).fontFamily },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: narrow ? 44 : 62, r: 12, t: 12, b: 50 },
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom" },
      hoverlabel: { bgcolor: css("--card"), bordercolor: line, font: { color: ink }, align: "left" },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      hovermode: "closest",
      ...layout,
      xaxis: axis(layout.xaxis || {}), yaxis: axis(layout.yaxis || {}),
    };
  };

  const source = (slug) => JSON.parse(document.getElementById("figure-" + slug).textContent);

  const draw = (element) => {
    const spec = coloured(source(element.dataset.figure).spec);
    const names = spec.data.flatMap((trace) => (trace.text || []).filter(Boolean));
    if (element.clientWidth < 520 && names.length > 5) {  // they would lie on each other; a tap and the table tell them
      for (const trace of spec.data) if (trace.mode) trace.mode = trace.mode.replace("+text", "");
    }
    const options = { responsive: true, displaylogo: false, displayModeBar: false };
    return Plotly.react(element, spec.data, themed(spec.layout, element.clientWidth), options).then(() => {
      element.dataset.drawn = "true";
      if (element.dataset.link && !element.dataset.listening) {
        element.dataset.listening = "true";
        element.on("plotly_click", (event) => {
          const id = event.points[0].customdata;
          if (id) location.href = element.dataset.link + encodeURIComponent(id);
        });
      }
    });
  };

  const save = (name, text, type) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  };

  const csv = (rows) => {
    const quoted = (value) => {
      const text = value === null || value === undefined ? "" : String(value);
      return /[",\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
    };
    const names = Object.keys(rows[0] || {});
    return [names.join(","), ...rows.map((row) => names.map((name) => quoted(row[name])).join(","))].join("\n") + "\n";
  };

  const download = (button) => {
    const slug = button.dataset.slug, element = document.querySelector('[data-figure="' + CSS.escape(slug) + '"]');
    if (button.dataset.download === "csv") return save(slug + ".csv", csv(source(slug).rows), "text/csv");
    const spec = coloured(source(slug).spec), layout = { ...themed(spec.layout, 1000), paper_bgcolor: css("--card") };
    return Plotly.downloadImage({ data: spec.data, layout }, { format: button.dataset.download, filename: slug, width: 1000, height: 620, scale: 2 });
  };

  const pause = () => new Promise((done) => setTimeout(done));

  // One after the other, from the top, so that the page answers in between.
  const all = async () => {
    for (const element of document.querySelectorAll("[data-figure]")) {
      if (element.isConnected) await draw(element);
      await pause();
    }
  };

  // plotly.js is large: the page is painted and can be used before it is run. A report has it in itself.
  const plotly = () =>
    window.Plotly ? Promise.resolve() : new Promise((done, failed) => requestAnimationFrame(() => setTimeout(() => {
      const script = document.createElement("script");
      script.src = document.getElementById("plotly").href;
      script.onload = done;
      script.onerror = failed;
      document.head.append(script);
    })));
  const ready = new Promise((done) => addEventListener("DOMContentLoaded", () => done(plotly())));
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-download]");
    if (button) download(button);
  });
  ready.then(all).then(() => (document.documentElement.dataset.figures = "drawn"));
  ready.then(() => matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all));
  return { draw, all: () => ready.then(all) };
})();
