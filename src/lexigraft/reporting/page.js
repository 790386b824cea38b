"use strict";
(() => {
  const $ = (selector) => document.querySelector(selector);
  const make = (name, kind, text) => {
    const element = document.createElement(name);
    if (kind) element.className = kind;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const data = JSON.parse($("#data").textContent);
  const language = document.documentElement.lang;

  // Light and dark: what was chosen here stays; else the system decides.
  const root = document.documentElement;
  const store = (value) => {
    try { return value ? localStorage.setItem("theme", value) : localStorage.getItem("theme"); }
    catch { return null; }
  };
  const chosen = store();
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  $("#theme").addEventListener("click", () => {
    const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    root.dataset.theme = (root.dataset.theme || system) === "dark" ? "light" : "dark";
    store(root.dataset.theme);
  });

  // What a new token is, on hover, focus and touch.
  const tip = $("#tip");
  const show = (target) => {
    tip.textContent = target.dataset.tip;
    tip.hidden = false;
    const at = target.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(at.left, innerWidth - own.width - 12);
    const below = at.bottom + 6;
    tip.style.left = `${Math.max(12, left)}px`;
    tip.style.top = `${below + own.height > innerHeight ? at.top - own.height - 6 : below}px`;
    target.setAttribute("aria-describedby", "tip");
  };
  for (const event of ["mouseover", "focusin", "click"]) {
    document.addEventListener(event, ({ target }) => {
      const chip = target.closest && target.closest("[data-tip]");
      if (chip) show(chip); else tip.hidden = true;
    });
  }
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  addEventListener("keydown", ({ key }) => { if (key === "Escape") tip.hidden = true; });

  // A token as the page shows tokens everywhere.
  const isRaw = (text) => /^<[0-9A-F]+>$/.test(text);
  const chip = (text, isNew, hint) => {
    const found = make(hint ? "button" : "span", `chip${isNew ? " new" : ""}${isRaw(text) ? " raw" : ""}`);
    if (hint) { found.type = "button"; found.dataset.tip = hint; }
    found.append(make("bdi", "", text));
    return found;
  };

  // The table of tokens.
  const body = $("#tokens tbody");
  if (body) {
    const columns = [...document.querySelectorAll("#tokens th")].map((head) => head.dataset);
    const step = 100;
    let rows = data.tokens, shown = step, key = 0, down = false;
    const number = (value, digits) => value.toLocaleString(language, { minimumFractionDigits: digits, maximumFractionDigits: digits });
    const formats = {
      id: (v) => String(v),
      count: (v) => number(v, 0),
      decimal: (v) => number(v, 1),
      distance: (v) => number(v, 3),
      share: (v) => `${number(100 * v, 0)}%`,
    };
    const cell = (value, { kind }) => {
      if (kind === "token") { const td = make("td", "token"); td.append(chip(value, true)); return td; }
      if (kind === "pieces") { const td = make("td", "wide"); td.append(...value.map((text) => chip(text, false))); return td; }
      if (kind === "word") return make("td", "word", value === null ? "–" : data.words[value] || value);
      return make("td", "number", value === null ? "–" : formats[kind](value));
    };
    const draw = () => {
      body.replaceChildren(...rows.slice(0, shown).map((row) => {
        const line = make("tr");
        line.append(...row.slice(0, columns.length).map((value, place) => cell(value, columns[place])));
        return line;
      }));
      $("#found").textContent = data.found.replace("{shown}", number(Math.min(shown, rows.length), 0)).replace("{found}", number(rows.length, 0)).replace("{all}", number(data.tokens.length, 0));
      $("#more").hidden = shown >= rows.length;
    };
    const collator = new Intl.Collator(language);
    const compare = (one, other) => {
      const a = one[key], b = other[key];
      if (a === null || b === null) return (a === null) - (b === null);
      const order = typeof a === "number" ? a - b : collator.compare(String(a), String(b));
      return down ? -order : order;
    };
    const update = () => {
      const wanted = $("#search").value.trim().toLowerCase();
      const said = (row) => [...row, data.words[row[columns.length - 1]], data.words[row[6]]].flat().join("\n").toLowerCase();
      rows = data.tokens.filter((row) => !wanted || said(row).includes(wanted)).sort(compare);
      draw();
    };
    $("#search").addEventListener("input", () => { shown = step; update(); });
    $("#more").addEventListener("click", () => { shown += 4 * step; draw(); });
    document.querySelectorAll("#tokens th button").forEach((button, place) => {
      button.addEventListener("click", () => {
        const numeric = button.parentElement.classList.contains("number");
        down = key === place ? !down : numeric && place > 0;
        key = place;
        document.querySelectorAll("#tokens th").forEach((head) => head.removeAttribute("aria-sort"));
        button.parentElement.setAttribute("aria-sort", down ? "descending" : "ascending");
        update();
      });
    });
    update();
  }

  // The box of `lexigraft serve`.
  const form = $("#try form");
  if (!form) return;
  const text = $("#try textarea"), said = $("#try [role=status]");
  const ask = async (path) => {
    const answer = await fetch(path, {
      method: "POST", headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ text: text.value }),
    });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    return found;
  };
  let latest = 0;
  const segment = async () => {
    const mine = ++latest;
    try {
      const found = await ask("segments");
      if (mine !== latest) return;
      for (const side of ["before", "after"]) {
        const line = $(`#${side}`);
        line.replaceChildren(...found[side].map(([, token, isNew, hint]) => chip(token, isNew, hint)));
        line.dir = found.direction;
        $(`#${side}-count`).textContent = found[side].length;
      }
      said.textContent = "";
    } catch (fault) { said.textContent = fault.message; }
  };
  let waiting;
  text.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(segment, 120); });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = $("#try [type=submit]");
    button.disabled = true;
    said.textContent = data.working;
    try {
      const found = await ask("continuations");
      $("#continuations").replaceChildren(...found.models.flatMap(({ name, text: written }) => {
        const value = make("dd");
        value.append(make("bdi", "", written));
        return [make("dt", "", data.words[name] || name), value];
      }));
      said.textContent = "";
    } catch (fault) { said.textContent = fault.message; }
    button.disabled = false;
  });
  segment();
})();
