// The token viewer: one response at a time, its tokens coloured; the panel explains the one that is hovered or focused.
"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const { scale, responses } = JSON.parse(find("token-data").textContent);
  const row = find("token-row");
  let response = responses[0];
  let selected = 0; // the token that the Tab key reaches
  let mode = "reward";

  const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
  const written = (text) => text.replaceAll("\n", "↵") + (text.includes("\n") ? "\n" : "") || "∅";
  const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);
  const probability = (p) => (p > 0 && p < 0.001 ? "<0.001" : p.toFixed(3));

  function element(tag, text, className = "") {
    const made = document.createElement(tag);
    made.textContent = text;
    made.className = className;
    return made;
  }

  function meaning(reward) {
    if (Math.abs(reward) < 0.05) return "the teacher agrees";
    if (reward < 0) return "more likely under the teacher";
    return reward > Math.LN2 ? "less than half as likely under the teacher" : "less likely under the teacher";
  }

  function guesses(id, own, text, top) {
    find(`${id}-own`).textContent = probability(own);
    const known = top.some(([token]) => token === text);
    const rows = known ? top : [...top, [text, own]];
    find(id).replaceChildren(
      ...rows.map(([token, p]) => {
        const item = element("li", "", token === text ? "own" : "");
        const bar = element("span", "", "bar");
        bar.style.setProperty("--w", `${100 * p}%`);
        item.append(element("code", visible(token)), bar, element("span", probability(p)));
        return item;
      }),
    );
  }

  function explain(index) {
    const token = response.tokens[index];
    find("token-panel").hidden = !token;
    if (!token) return;
    find("token-text").textContent = visible(token.text);
    find("token-place").textContent = `token ${response.start + index + 1} of ${response.total}`;
    find("token-values").textContent =
      `KL ${token.kl.toFixed(3)} nats. Token KL reward ${signed(token.reward)}: ${meaning(token.reward)}.`;
    guesses("student", token.student, token.text, token.student_top);
    guesses("teacher", token.teacher, token.text, token.teacher_top);
  }

  function select(index) {
    const tokens = row.children;
    if (!tokens.length) return;
    tokens[selected]?.setAttribute("aria-selected", "false");
    if (tokens[selected]) tokens[selected].tabIndex = -1;
    selected = index;
    tokens[index].setAttribute("aria-selected", "true");
    tokens[index].tabIndex = 0;
    explain(index);
  }

  function paint() {
    const most = scale[mode];
    response.tokens.forEach((token, index) => {
      const value = token[mode];
      const shade = row.children[index];
      shade.className = mode === "kl" ? "kl" : value > 0 ? "take" : "add";
      shade.classList.toggle("marked", index === response.first_wrong);
      shade.style.setProperty("--w", `${Math.round(100 * Math.min(1, Math.abs(value) / most))}%`);
    });
    find("scale-bar").className = mode;
    find("scale-low").textContent = mode === "kl" ? "0" : `−${most}`;
    find("scale-high").textContent = mode === "kl" ? `${most} nats` : `+${most} nats`;
  }

  function show(index) {
    response = responses[index];
    selected = 0;
    find("token-question").replaceChildren(
      "Question ", element("code", response.question), ", right answer ", element("code", response.gold),
      `. Verdict: ${response.verdict}. Sampled at step ${response.step}.`,
    );
    row.replaceChildren(
      ...response.tokens.map((token, place) => {
        const made = element("span", written(token.text));
        made.setAttribute("role", "option");
        made.setAttribute("aria-selected", "false");
        made.tabIndex = -1;
        made.dataset.place = place;
        return made;
      }),
    );
    const shown = response.tokens.length;
    find("token-window").textContent =
      shown < response.total ? `Tokens ${response.start + 1} to ${response.start + shown} of ${response.total}.` : "";
    paint();
    explain(-1);
    select(response.tokens.reduce((best, token, place, all) => (token.kl > all[best].kl ? place : best), 0));
    row.scrollTop = row.children.length && row.children[selected].offsetTop - row.offsetTop - row.clientHeight / 2;
  }

  const place = (event) => event.target.dataset.place;
  row.addEventListener("pointerover", (event) => place(event) && explain(Number(place(event))));
  row.addEventListener("pointerleave", () => explain(selected));
  row.addEventListener("click", (event) => place(event) && select(Number(place(event))));
  row.addEventListener("focusin", (event) => place(event) && select(Number(place(event))));
  row.addEventListener("keydown", (event) => {
    const last = response.tokens.length - 1;
    const to = { ArrowRight: selected + 1, ArrowDown: selected + 1, ArrowLeft: selected - 1, ArrowUp: selected - 1,
      Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    row.children[Math.max(0, Math.min(last, to))].focus();
  });
  document.querySelectorAll("[name=response]").forEach((input) =>
    input.addEventListener("change", () => show(Number(input.value))));
  document.querySelectorAll("[name=mode]").forEach((input) =>
    input.addEventListener("change", () => { mode = input.value; paint(); }));
  // a reloaded page keeps the selection
  mode = document.querySelector("[name=mode]:checked").value;
  show(Number(document.querySelector("[name=response]:checked").value));
})();
