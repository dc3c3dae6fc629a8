// The hits of one input, which a person corrects: a list, ascending in time. A hit is never changed
// but replaced by another, so an edit is undone by going back to the list before it.
const hitOf = ([time, strength = null, material = null, guess = false]) => ({ time, strength, material, guess })

class Hits {
  // clip: of the page's data; column: seconds in which the network takes one hit; onchange: called after every edit
  constructor(clip, column, onchange) {
    Object.assign(this, { clip, column, onchange, selected: null, before: [], isKept: true })
    this.place = "diff-foley hits " + clip.id
    this.original = clip.hits.map(hitOf)
    this.list = recall(this.place)?.map(hitOf) ?? this.original
  }
  get isEdited() { return this.list !== this.original }

  // one that `goesOn`, as while a hit is dragged, is undone with the one before
  edit(list, selected, goesOn = false) {
    if (!goesOn) this.before.push(this.list)
    this.become(list, selected)
  }
  become(list, selected) {
    this.list = list === this.original ? list : list.sort((a, b) => a.time - b.time)
    this.selected = selected
    const fields = list.map(({ time, strength, material, guess }) => [time, strength, material, guess])
    this.isKept = keep(this.place, this.isEdited ? fields : null)
    this.onchange()
  }
  undo() {
    if (!this.before.length) return
    const undone = new Set(this.list)
    const list = this.before.pop()
    this.become(list, list.find(hit => !undone.has(hit)) ?? null)
  }

  select(hit) {
    this.selected = hit ?? null
    this.onchange()
  }
  // of two hits in one column the network takes the stronger: where one is, it is selected instead
  add(time) {
    const hit = hitOf([this.within(time)])
    const other = this.rival(hit)
    if (other) this.select(other)
    else this.edit([...this.list, hit], hit)
  }
  // gives the selected hit other fields; the rest stays, and a guess is one until a material is given
  change(fields, goesOn = false) {
    if (!this.selected) return
    const hit = { ...this.selected, ...fields }
    // hits of a file may lie outside of the part that is shown, and stay there
    if ("time" in fields) hit.time = this.within(hit.time)
    if ("material" in fields) hit.guess = false
    this.edit(this.list.map(one => one === this.selected ? hit : one), hit, goesOn)
  }
  remove() {
    if (this.selected) this.edit(this.list.filter(hit => hit !== this.selected), null)
  }
  // a hit to which the player was moved can lie a little after the time that the player says
  removeAfter(time) {
    const kept = this.list.filter(hit => hit.time <= time + this.column)
    if (kept.length < this.list.length) this.edit(kept, null)
  }
  discard() {
    if (this.isEdited) this.edit(this.original, null)
  }

  // whole microseconds, as in the file; what is made ends before `seconds`
  within(time) {
    const latest = Math.max(this.clip.seconds - this.column, 0)
    return Math.round(1e6 * Math.min(Math.max(time, 0), latest)) / 1e6
  }
  // another hit in the column of this one
  rival(hit) {
    const columnOf = one => Math.round(one.time / this.column)
    return this.list.find(other => other !== hit && columnOf(other) === columnOf(hit))
  }
  // the hit nearest to a time, if it is at most `most` seconds away
  nearest(time, most) {
    const away = hit => Math.abs(hit.time - time)
    const hit = this.list.reduce((best, one) => best && away(best) <= away(one) ? best : one, null)
    return hit && away(hit) <= most ? hit : null
  }
  // the hit after (1) or before (-1) the selected one, or else a time
  next(step, time) {
    if (this.selected) return this.list[this.list.indexOf(this.selected) + step]
    return step > 0 ? this.list.find(hit => hit.time > time) : this.list.findLast(hit => hit.time < time)
  }

  // the label track, as common/onsets.py writes it: its times are seconds from the video's first picture
  get text() {
    return this.list.map(hit => {
      const time = (hit.time + this.clip.start).toFixed(6)
      return `${time}\t${time}\t${[materialOf(hit), strengthOf(hit)].filter(Boolean).join(" ")}\n`
    }).join("")
  }
}

// fields as words of a label, "" for nothing said; a guess has a question mark behind it
const materialOf = hit => hit.material ? hit.material + (hit.guess ? "?" : "") : ""
const strengthOf = ({ strength }) => {
  if (strength === null) return ""
  return Number.isInteger(strength) ? strength.toFixed(1) : String(strength)  // 1.0, as Python writes it
}

const UNSAID = 0.6  // height of a hit whose strength is left to the model
// The hits as lines: one in the hits' lane, as high as it is strong, and a faint one over all lanes.
class HitLines {
  constructor(hits, lane, over) {
    Object.assign(this, { hits, lane, over, lines: new Map() })
  }
  // only what differs from before is drawn: a film may have thousands of hits
  show() {
    const { list, selected } = this.hits
    const present = new Set(list)
    for (const [hit, lines] of this.lines) {
      if (present.has(hit)) continue
      lines.forEach(line => line.remove())
      this.lines.delete(hit)
    }
    for (const hit of list) if (!this.lines.has(hit)) this.lines.set(hit, this.draw(hit))
    this.chosen?.forEach(line => line.classList.remove("selected"))
    this.chosen = this.lines.get(selected)
    this.chosen?.forEach(line => line.classList.add("selected"))
  }
  draw(hit) {
    const left = `${100 * hit.time / this.hits.clip.seconds}%`
    const line = make("span", "hit")
    const faint = make("span", "hit")
    Object.assign(line.style, { left, height: `${100 * (hit.strength ?? UNSAID)}%` })
    line.title = [`${hit.time.toFixed(3)} s`, materialOf(hit), strengthOf(hit)].filter(Boolean).join(", ")
    faint.style.left = left
    this.lane.append(line)
    this.over.append(faint)
    return [line, faint]
  }
}
