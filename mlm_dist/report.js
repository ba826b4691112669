// The values under the cursor, in all charts at once. The page is whole without this.
"use strict";
(() => {
  const UNITS = { seconds: " s", megabytes: " MB", gigabytes: " GB" };

  const show = (value, unit) => {
    if (value === undefined) return "-";
    if (value === null) return "not finite";
    if (unit === "share") return `${Number((100 * value).toPrecision(4))} %`;
    if (unit === "seconds" && value && Math.abs(value) < 0.1) return `${Number((1000 * value).toPrecision(4))} ms`;
    const size = Math.abs(value);
    const text = size >= 1000 && size < 1e15 ? Math.round(value).toLocaleString("en")
      : size && size < 1e-4 ? value.toExponential(4).replace(/\.?0*e/, "e")
      : String(Number(value.toPrecision(5)));
    return text + (UNITS[unit] || "");
  };

  const axis = () => (document.getElementById("axis-tokens").checked ? "tokens" : "steps");

  // The place in a rising list whose number lies nearest.
  const nearest = (list, wanted) => {
    let low = 0, high = list.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (list[middle] < wanted) low = middle; else high = middle;
    }
    return wanted - list[low] <= list[high] - wanted ? low : high;
  };

  const charts = [...document.querySelectorAll(".chart")].map((figure) => {
    const line = document.createElement("div");
    line.className = "cursor";
    line.hidden = true;
    const plot = figure.querySelector(".plot");
    plot.append(line);
    const values = [...figure.querySelectorAll(".legend b")];
    return {
      plot, line, values,
      shown: figure.querySelector(".at"),
      labels: [...figure.querySelectorAll(".legend span")].map((element) => element.textContent),
      last: values.map((element) => element.textContent),
      ...JSON.parse(figure.querySelector("script").textContent),
    };
  });

  const spoken = document.querySelector(".unseen");

  const clear = () => {
    for (const chart of charts) {
      chart.line.hidden = true;
      chart.shown.textContent = "";
      chart.values.forEach((element, i) => { element.textContent = chart.last[i]; });
    }
  };

  // Show what stands at a step (or token) in every chart, as far as its curves reach.
  const point = (wanted) => {
    const along = axis();
    for (const chart of charts) {
      const [first, last] = chart.spans[along];
      const places = chart.curves.map((curve) => nearest(curve[along], wanted));
      const distances = chart.curves.map((curve, i) => Math.abs(curve[along][places[i]] - wanted));
      const best = distances.indexOf(Math.min(...distances));
      const at = chart.curves[best][along][places[best]];
      chart.curves.forEach((curve, i) => {
        const beyond = at > curve[along][curve[along].length - 1] || at < curve[along][0];
        chart.values[i].textContent = show(beyond ? undefined : curve.values[nearest(curve[along], at)], chart.unit);
      });
      const step = chart.curves[best].steps[places[best]], tokens = chart.curves[best].tokens[places[best]];
      chart.shown.textContent = `step ${step.toLocaleString("en")}, ${tokens.toLocaleString("en")} tokens`;
      chart.line.style.left = `${(100 * (at - first)) / (last - first)}%`;
      chart.line.hidden = wanted < first || wanted > last;
    }
  };

  for (const chart of charts) {
    const { plot } = chart;
    let place = -1;
    const follow = (event) => {
      const box = plot.getBoundingClientRect(), [first, last] = chart.spans[axis()];
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      point(first + share * (last - first));
    };
    plot.addEventListener("pointermove", follow);
    plot.addEventListener("pointerdown", follow);
    plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") clear(); });
    plot.addEventListener("blur", clear);
    plot.addEventListener("keydown", (event) => {
      const list = chart.curves[0][axis()], last = list.length - 1;
      const wanted = { ArrowRight: place + 1, ArrowLeft: place < 0 ? last : place - 1, Home: 0, End: last }[event.key];
      if (wanted === undefined) return;
      event.preventDefault();
      place = Math.min(last, Math.max(0, wanted));
      point(list[place]);
      spoken.textContent = [chart.shown, ...chart.values]
        .map((element, i) => `${i ? chart.labels[i - 1] : ""} ${element.textContent}`).join("; ");
    });
  }
  document.querySelectorAll('input[name="axis"]').forEach((input) => input.addEventListener("change", clear));
})();
