// The chart of results, to zoom and to filter. The library is fetched when the chart comes near.
// Without scripts, and until the library is there, the picture stands in its place.
{
  const base = document.currentScript.src;
  const box = document.querySelector(".explorer");
  const picture = box.closest("figure").querySelector("img");
  const plot = box.querySelector(".explorer-plot");
  const message = document.querySelector(".explorer-message");
  const { looks, axes, recipes, library } = JSON.parse(box.querySelector("script").textContent);
  const [images, across, scale] = ["images", "across", "scale"].map((name) =>
    box.querySelector(`[name=${name}]`),
  );
  const families = [...box.querySelectorAll("[type=checkbox]")];
  const touch = matchMedia("(hover: none)").matches;

  for (const recipe of recipes) {
    recipe.error = 100 * (1 - recipe.mean);
    recipe.best = 100 * (1 - recipe.high);
    recipe.worst = 100 * (1 - recipe.low);
  }

  const wide = () => plot.clientWidth > 600; // else there is no room for names
  const count = (value) => value.toLocaleString("en");
  const tell = (r) =>
    [
      `<b>${r.name}</b>${wide() ? " · " : "<br>"}${r.family}`,
      `error ${r.error.toFixed(2)} ± ${(100 * r.sd).toFixed(2)}% (mean ± sd, n = ${r.n})`,
      `95% interval ${r.best.toFixed(2)} to ${r.worst.toFixed(2)}%`,
      `${count(r.params)} parameters, ${count(r.bytes)} bytes`,
      `${count(r.macs)} MACs${r.time === null ? "" : `, time ${r.time}`}`,
      ...r.notes.split("; ").filter(Boolean),
      wide() ? r.command : r.command.replace(" --", "<br>  --"),
      `<i>${touch ? "tap again" : "click"} for its row</i>`,
    ].join("<br>");

  // What the choices leave, from left to right; of one place, the best first.
  const chosen = () => {
    const key = across.value;
    const ticked = new Set(families.filter((one) => one.checked).map((one) => one.value));
    return recipes
      .filter((r) => r.images === images.value && ticked.has(r.family) && r[key] !== null)
      .sort((a, b) => a[key] - b[key] || a.error - b.error);
  };

  // Those of one place stand side by side, within 4% of it.
  const places = (shown) => {
    const key = across.value;
    return new Map(
      shown.map((r) => {
        const same = shown.filter((other) => other[key] === r[key]);
        const step = Math.min(0.02, 0.08 / same.length);
        return [r, r[key] * Math.exp(step * (same.indexOf(r) - (same.length - 1) / 2))];
      }),
    );
  };

  const span = (values, pad) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const room = pad * (high - low) || pad;
    return [low - room, high + room];
  };

  // In the units of Plotly's ranges: exponents, where the scale is logarithmic.
  const logarithmic = () => scale.value === "logarithmic";
  const unit = (error) => (logarithmic() ? Math.log10(error) : error);

  // What nothing to its left beats.
  const frontier = (shown) =>
    shown.filter((r, i) => shown.slice(0, i).every((left) => r.error < left.error));

  // About as many pixels as its name takes, and as a side of the axes has.
  const long = (r) => 6.5 * r.name.length + 20;
  const sides = () => [plot.clientWidth - 80, plot.clientHeight - 70];

  // Ranges that hold all that is shown, and the frontier's names, which stand left of their points.
  const whole = (shown, place) => {
    if (!shown.length) return { x: [3, 6], y: logarithmic() ? [-1, 1] : [0, 5] };
    const [low, high] = span(shown.map((r) => Math.log10(place.get(r))), 0.08);
    const starts = frontier(shown).map((r) => {
      const share = wide() ? Math.min(0.5, long(r) / sides()[0]) : 0;
      return (Math.log10(place.get(r)) - share * high) / (1 - share);
    });
    const ends = shown.flatMap((r) => [r.best, r.worst]).filter((v) => v > 0);
    const [floor, top] = span(ends.map(unit), 0.06);
    return { x: [Math.min(low, ...starts), high], y: [logarithmic() ? floor : 0, top] };
  };

  // The frontier's names, without those that would lie on another.
  const names = (edge, place, view) => {
    const taken = [];
    return edge.map((r) => {
      const [x, y] = [
        [view.x, Math.log10(place.get(r)), sides()[0]],
        [view.y, unit(r.error), sides()[1]],
      ].map(([[low, high], value, side]) => ((value - low) / (high - low)) * side);
      const start = x - long(r);
      if (taken.some(([from, to, at]) => x > from && start < to && Math.abs(at - y) < 14)) return "";
      taken.push([start, x, y]);
      return `${r.name}\u00a0\u00a0\u00a0`;
    });
  };

  const view = () => ({ x: plot.layout.xaxis.range, y: plot.layout.yaxis.range });
  const draw = (seen) => {
    const shown = chosen();
    const place = places(shown);
    const edge = frontier(shown);
    const { x, y } = seen ?? whole(shown, place);
    const style = getComputedStyle(plot);
    const colour = (name) => style.getPropertyValue(`--pst-color-${name}`).trim();
    const font = { family: style.fontFamily, size: 13, color: colour("text-base") };

    const traces = Object.entries(looks).map(([family, look]) => {
      const own = shown.filter((r) => r.family === family);
      return {
        name: family,
        x: own.map((r) => place.get(r)),
        y: own.map((r) => r.error),
        customdata: own.map((r) => r.name),
        hovertext: own.map(tell),
        hoverinfo: "text",
        mode: "markers",
        marker: { symbol: look.symbol, color: look.colour, size: 9 },
        error_y: {
          symmetric: false,
          array: own.map((r) => r.worst - r.error),
          arrayminus: own.map((r) => r.error - r.best),
          color: look.colour,
          thickness: 1.5,
          width: 3,
        },
      };
    });
    traces.unshift({
      name: "frontier",
      x: edge.map((r) => place.get(r)),
      y: edge.map((r) => r.error),
      text: wide() ? names(edge, place, { x, y }) : "",
      textposition: "bottom left",
      textfont: { size: 11.5 },
      mode: "lines+text",
      line: { shape: "hv", dash: "dot", width: 1.5, color: colour("text-muted") },
      hoverinfo: "skip",
    });

    const axis = (title, log, range, tickformat) => {
      const decades = range[1] - range[0];
      return {
        title: { text: title, standoff: 8 },
        type: log ? "log" : "linear",
        range,
        // 1, 2 and 5 of each decade; where there is less or much more, as Plotly thinks best.
        dtick: log && decades > 1 && decades < 3 ? "D2" : undefined,
        nticks: 6,
        tickformat,
        ticks: "outside",
        tickcolor: colour("border"),
        gridcolor: "rgba(127, 127, 127, 0.3)",
        zeroline: false,
        automargin: true,
      };
    };
    const layout = {
      width: plot.clientWidth,
      height: plot.clientHeight,
      margin: { l: 10, r: 10, t: 10, b: 10 },
      xaxis: axis(axes[across.value], true, x, across.value === "time" ? "~g" : "~s"),
      yaxis: axis("test error, %", logarithmic(), y, "~g"),
      font,
      paper_bgcolor: "transparent",
      plot_bgcolor: colour("background"), // by it Plotly picks the colours of the zoom's box
      showlegend: false,
      hovermode: "closest",
      hoverlabel: {
        align: "left",
        bgcolor: colour("surface"),
        bordercolor: colour("text-muted"),
        font: { ...font, size: 12.5 },
      },
      dragmode: touch ? false : "zoom", // a finger scrolls the page
    };
    const config = {
      displayModeBar: false,
      doubleClick: false, // shows all, below
      showAxisRangeEntryBoxes: false,
      showTips: false,
    };
    Plotly.react(plot, traces, layout, config);

    const all = recipes.filter((r) => r.images === images.value).length;
    box.querySelector("[role=status]").textContent = `${shown.length} of ${all} recipes`;
    plot.setAttribute(
      "aria-label",
      `Test error of ${shown.length} recipes on ${images.value}, ` +
        `against ${axes[across.value]}. The table below holds the numbers.`,
    );
  };

  // Both axes: by a factor about the middle, and by a share of what is seen.
  const move = (factor, right = 0, up = 0) => {
    const next = ([low, high], share) => {
      const middle = (low + high) / 2 + share * (high - low);
      const half = (factor * (high - low)) / 2;
      return [middle - half, middle + half];
    };
    draw({ x: next(view().x, right), y: next(view().y, up) });
  };
  const moves = {
    "Zoom in": () => move(0.6),
    "Zoom out": () => move(1 / 0.6),
    "Move left": () => move(1, -0.25),
    "Move right": () => move(1, 0.25),
    "Move up": () => move(1, 0, 0.25),
    "Move down": () => move(1, 0, -0.25),
    "Reset view": () => draw(),
  };

  // To a row of the table; its filter may hide it.
  const lead = (name) => {
    const row = document.getElementById(name);
    if (row.hidden) {
      const filter = document.querySelector(".results-filter input");
      filter.value = "";
      filter.dispatchEvent(new Event("input"));
    }
    const link = row.querySelector("a");
    link.click();
    link.focus({ preventScroll: true });
  };

  const start = () => {
    box.hidden = false;
    picture.hidden = true;
    draw();

    for (const choice of [images, across, scale]) {
      choice.addEventListener("change", () => draw());
    }
    for (const one of families) one.addEventListener("change", () => draw(view()));
    for (const [name, checked] of [["all", true], ["none", false]]) {
      box.querySelector(`button[name=${name}]`).addEventListener("click", () => {
        for (const one of families) one.checked = checked;
        draw(view());
      });
    }
    for (const button of box.querySelectorAll(".explorer-moves button")) {
      button.addEventListener("click", moves[button.title || button.textContent]);
    }

    const tapped = { name: "", at: 0 };
    plot.on("plotly_click", ({ points: [{ customdata: name }] }) => {
      if (!touch) return lead(name);
      const at = performance.now();
      if (at - tapped.at < 600) return; // a browser tells of a tap twice
      if (tapped.name === name) lead(name);
      Object.assign(tapped, { name, at }); // the first shows what the point is
    });
    plot.on("plotly_relayout", () => draw(view())); // the mouse has moved the axes
    if (!touch) plot.on("plotly_doubleclick", () => draw());
    for (const [event, over] of [["plotly_hover", true], ["plotly_unhover", false]]) {
      plot.on(event, () => plot.classList.toggle("on-point", over));
    }

    new ResizeObserver(() => draw(view())).observe(plot);
    new MutationObserver(() => draw(view())).observe(document.documentElement, {
      attributeFilter: ["data-theme"],
    });
    box.dataset.state = "ready";
  };

  const load = () => {
    const script = document.createElement("script");
    script.src = new URL(library, base);
    script.onload = start;
    script.onerror = () => {
      message.textContent =
        "The chart to zoom and filter could not be loaded; this picture shows the same recipes.";
      message.hidden = false;
      box.dataset.state = "failed";
    };
    document.head.append(script);
  };
  new IntersectionObserver(([entry], observer) => {
    if (!entry.isIntersecting) return;
    observer.disconnect();
    load();
  }, { rootMargin: "300px" }).observe(picture);
}
