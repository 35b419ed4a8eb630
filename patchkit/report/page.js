"use strict";
// Shows the facts: one row each, opened on demand; what is said is put in as text and never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  if (!data.sets.length) return;
  const text = (number) => data.texts[number];
  const at = (id) => document.getElementById(id);
  const sentence = (said) => said.charAt(0).toUpperCase() + said.slice(1) + ".";
  const PAGE = 200;
  let shown = PAGE;

  const make = (kind, name, content) => {
    const node = document.createElement(kind);
    if (name) node.className = name;
    if (content !== undefined) node.textContent = content;
    return node;
  };

  // --- what changed between two texts, by the longest common sequence of words ---
  const words = (said) => said.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) || [];

  const common = (a, b) => {
    const best = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i--)
      for (let j = b.length - 1; j >= 0; j--)
        best[i][j] = a[i] === b[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
    const inA = new Set(), inB = new Set();
    for (let i = 0, j = 0; i < a.length && j < b.length; ) {
      if (a[i] === b[j]) { inA.add(i++); inB.add(j++); }
      else if (best[i + 1][j] >= best[i][j + 1]) i++;
      else j++;
    }
    return [inA, inB];
  };

  const fill = (node, parts, kept, kind) => {
    let run = "", gap = "", marked = false;
    const flush = () => {
      if (run) node.append(marked ? make(kind, "", run) : run);
      run = "";
    };
    parts.forEach((part, place) => {
      if (!part.trim()) { gap += part; return; }
      const mark = !kept.has(place);
      if (mark !== marked) {  // what lies between two runs belongs to neither mark
        flush();
        if (gap) node.append(gap);
        gap = "";
        marked = mark;
      }
      run += gap + part;
      gap = "";
    });
    flush();
  };

  const sides = (before, after) => {
    const pair = make("div", "pair");
    const left = make("p", "side"), right = make("p", "side");
    left.dir = right.dir = "auto";
    left.append(make("span", "which", "before"));
    right.append(make("span", "which", "after"));
    const a = words(before), b = words(after);
    const [inA, inB] = common(a, b);
    fill(left, a, inA, "del");
    fill(right, b, inB, "ins");
    if (!a.length) left.append(make("i", "", "nothing"));
    if (!b.length) right.append(make("i", "", "nothing"));
    pair.append(left, right);
    return pair;
  };

  const row = ([label, said, before, after, remark, good]) => {
    const node = make("div", good === null ? "row" : good ? "row good" : "row bad");
    const head = make("p", "said");
    head.append(make("span", "label", text(label)));
    const words = make("q", "", text(said));
    words.dir = "auto";
    head.append(words);
    if (good !== null) head.append(make("span", "sign", good ? "✓" : "✗"));
    if (text(remark)) head.append(make("span", "remark", text(remark)));
    node.append(head, sides(text(before), text(after)));
    return node;
  };

  const body = (fact) => {
    const node = make("div", "body");
    if (text(fact.why)) {
      const why = make("p", "why", sentence(text(fact.why)) + " ");
      why.append(make("span", "", sentence(text(fact.advice))));
      node.append(why);
    }
    const chance = fact.chance.map((share) => share === null ? "not a number" : (100 * share).toFixed(share < 0.001 ? 2 : 1) + "%");
    const known = text(fact.true) ? `, instead of “${text(fact.true)}”` : "";
    const about = `Target “${text(fact.target)}”${known}. Its probability after the prompt: ${chance[0]} → ${chance[1]}.`;
    node.append(make("p", "about", about));
    for (const [title, rows] of fact.sections) {
      node.append(make("h4", "", text(title)));
      node.append(...rows.map(row));
    }
    return node;
  };

  const line = (fact) => {
    const node = make("details", fact.holds ? "fact held" : "fact lost");
    const head = make("summary");
    head.append(make("span", "sign", fact.holds ? "✓" : "✗"));
    const prompt = make("span", "prompt", text(fact.question) || text(fact.prompt));
    const old = make("del", "", text(fact.before) || "–"), now = make("ins", "", text(fact.after) || "–");
    prompt.dir = old.dir = now.dir = "auto";
    const said = make("span", "change");
    said.append(old, " → ", now);
    head.append(prompt, make("span", "target", text(fact.target)), said);
    if (text(fact.why)) head.append(make("span", "reason", text(fact.why)));
    head.append(make("code", "", text(fact.id)));
    node.append(head);
    node.addEventListener("toggle", () => {
      if (node.open && node.children.length === 1) node.append(body(fact));
    });
    return node;
  };

  // --- searching ---
  const KINDS = {
    all: () => true,
    lost: (fact) => !fact.holds,
    held: (fact) => fact.holds,
    unasked: (fact) => fact.unasked,
    moved: (fact) => fact.moved,
  };
  const hay = new WeakMap();
  const haystack = (fact) => {
    if (!hay.has(fact)) {
      const own = ["id", "prompt", "target", "true", "question", "before", "after", "why"].map((key) => text(fact[key]));
      for (const [, rows] of fact.sections) for (const each of rows) own.push(...each.slice(0, 5).map(text));
      hay.set(fact, own.join("\n").toLowerCase());
    }
    return hay.get(fact);
  };

  const set = () => data.sets[at("which").value || 0];
  const list = () => {
    const wanted = at("words").value.toLowerCase().split(/\s+/).filter(Boolean);
    const kind = KINDS[at("kind").value];
    const all = set().facts;
    const found = all.filter((fact) => kind(fact) && wanted.every((word) => haystack(fact).includes(word)));
    at("facts").replaceChildren(...found.slice(0, shown).map(line));
    const lost = found.filter((fact) => !fact.holds).length;
    const number = (value) => value.toLocaleString("en");
    const what = lost === 1 ? "one of which does not hold" : lost ? `${number(lost)} of which do not hold` : "all of which hold";
    at("count").textContent = `${number(found.length)} of ${number(all.length)} facts${found.length ? `, ${what}` : ""}`;
    at("more").hidden = found.length <= shown;
    at("more").textContent = `Show ${number(Math.min(PAGE, found.length - shown))} more`;
  };

  const others = () => {
    const rows = set().others;
    at("others").hidden = !rows.length;
    const changed = rows.filter((each) => !each[5]).length;
    at("others").firstChild.textContent = `Unrelated texts: ${changed} of ${rows.length} are answered otherwise than before`;
    at("others").lastChild.replaceChildren(...rows.map(row));
  };

  const again = () => { shown = PAGE; list(); };
  data.sets.forEach((each, number) => at("which").append(new Option(text(each.name), number)));
  at("which-label").hidden = data.sets.length < 2;
  at("words").addEventListener("input", again);
  at("kind").addEventListener("change", again);
  at("which").addEventListener("change", () => { again(); others(); });
  at("search").addEventListener("submit", (event) => event.preventDefault());
  at("more").addEventListener("click", () => { shown += PAGE; list(); });
  list();
  others();
})();
