// What can be chosen on the page: two methods, a method in the curves, two runs, a prompt. No request leaves the page.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);

const make = (tag, text, ...inside) => {
  const node = document.createElement(tag);
  if (text !== "") node.textContent = text;
  node.append(...inside);
  return node;
};

const onChoice = (ids, show) => {
  if (!ids.every(at)) return;
  for (const id of ids) at(id).addEventListener("change", show);
  show();
};

// Two methods
onChoice(["method-a", "method-b"], () => {
  const pair = [Number(at("method-a").value), Number(at("method-b").value)].sort((a, b) => a - b);
  const said = pair[0] === pair[1] ? ["Choose two methods."] : data.comparisons[pair.join(",")];
  at("said").replaceChildren(...(said.length ? said : ["They have no prompts in common."]).map((line) => make("p", line)));
});

// One method in all curves
let only = null;
for (const button of document.querySelectorAll("button[data-series]")) {
  button.addEventListener("click", () => {
    only = only === button.dataset.series ? null : button.dataset.series;
    for (const other of document.querySelectorAll("button[data-series]")) {
      other.setAttribute("aria-pressed", String(other.dataset.series === only));
    }
    for (const line of document.querySelectorAll("#curves .series")) {
      line.classList.toggle("faint", only !== null && !line.classList.contains(only));
    }
  });
}

// The settings of two runs
onChoice(["run-a", "run-b"], () => {
  const [a, b] = ["run-a", "run-b"].map((id) => data.settings[Number(at(id).value)]);
  const rows = data.varied.filter((key, i) => a[i] !== b[i]).map((key) => {
    const i = data.varied.indexOf(key);
    const name = make("code", key);
    const row = make("tr", "", make("td", "", name), make("td", a[i]), make("td", b[i]));
    if (!data.decides.includes(key)) row.className = "no";
    return row;
  });
  at("settings-rows").replaceChildren(...rows);
  at("alike").hidden = rows.length > 0;
});

// The answers to a prompt
const article = (title, answers, scores, note) => {
  const head = make("h4", title);
  if (note) {
    const more = make("span", note);
    more.className = "of";
    head.append(more);
  }
  const texts = answers.map((text, i) => {
    const pre = make("pre", "");
    if (Number.isFinite(scores[i])) {
      const score = make("span", scores[i].toFixed(2));
      score.className = "score";
      pre.append(score);
    }
    pre.append(text === "" ? "(empty)" : text);
    return pre;
  });
  return make("article", "", head, ...texts);
};

const showAnswers = () => {
  const number = Number(at("prompt").value);
  const chosen = data.answers.runs.filter((run) => at("which").value === "all" || run.first);
  at("asked").textContent = data.answers.prompts[number];
  const start = chosen.find((run) => run.said[number]);
  at("answers").replaceChildren(
    ...(start ? [article("start model", start.said[number].start, start.said[number].scores.start, "")] : []),
    ...chosen.filter((run) => run.said[number]).map((run) => {
      const said = run.said[number];
      return article(run.label, said.policy, said.scores.policy, `seed ${run.seed}, win rate here ${said.win_rate.toFixed(2)}`);
    }),
  );
};
onChoice(["prompt", "which"], showAnswers);
for (const [id, step] of [["before", -1], ["after", 1]]) {
  at(id)?.addEventListener("click", () => {
    const prompt = at("prompt");
    prompt.selectedIndex = (prompt.selectedIndex + step + prompt.options.length) % prompt.options.length;
    showAnswers();
  });
}
