// A picture with several sounds, of which one is heard: a muted <video>, and an <audio> for each.
// A jump in a sound can be heard, so the sound is the clock: where the two drift apart, the picture
// runs a little faster or slower until they agree.
class Player {
  // picture, sounds: {url, offset}; an offset is the second of its file at which the picture begins
  constructor(video, picture, sounds, seconds, onchange) {
    Object.assign(this, { video, seconds, onchange, current: 0, playing: false, loop: false })
    const load = (media, { url, offset }) => {
      media.onerror = () => { media.broken = true; this.onchange() }
      media.preload = "auto"
      media.offset = offset
      media.src = url
      media.currentTime = offset
      return media
    }
    this.audios = sounds.map(sound => load(new Audio(), sound))
    load(video, picture).muted = true
    // a codec that the browser lacks, beside one that it has, is no error, but shows nothing
    video.onloadedmetadata = () => { if (!video.videoWidth) video.onerror() }
  }
  get audio() { return this.audios[this.current] }
  // what tells the time: the sound, unless it is broken or shorter than the picture
  get clock() { return (this.audio.broken || this.audio.ended) && !this.video.broken ? this.video : this.audio }
  get time() { return Math.min(Math.max(this.clock.currentTime - this.clock.offset, 0), this.seconds) }
  seek(time) {
    time = Math.min(Math.max(time, 0), this.seconds)
    for (const media of [this.video, this.audio]) {
      media.currentTime = time + media.offset
      if (this.playing) media.play().catch(() => {})  // pausing breaks the promise of a start
    }
  }

  toggle() {
    if (this.playing) return this.pause()
    this.playing = true
    this.seek(this.time > this.seconds - 0.05 ? 0 : this.time)
    this.onchange()
  }
  pause() {
    this.playing = false
    for (const media of [this.video, ...this.audios]) media.pause()
    this.onchange()
  }

  // another sound at the same place; the one before is heard until it runs
  select(k) {
    if (k === this.current || !this.audios[k]) return
    const [before, time] = [this.audio, this.time]
    this.current = k
    this.audio.currentTime = time + this.audio.offset
    const stop = () => { if (before !== this.audio) before.pause() }
    if (this.playing) this.audio.play().then(stop, stop)
    this.onchange()
  }

  // called again and again: keeps the picture with the sound, and ends or begins anew
  follow() {
    const late = this.time - (this.video.currentTime - this.video.offset)  // the picture, by seconds
    this.video.playbackRate = Math.abs(late) > 0.02 && Math.abs(late) < 0.3 ? 1 + late : 1
    if (!this.playing) return
    if (Math.abs(late) >= 0.3 && !this.video.seeking) this.video.currentTime = this.time + this.video.offset
    if (this.time < this.seconds - 0.02 && !this.clock.ended) return
    if (this.loop) this.seek(0)
    else this.pause()
  }

  // lets go of all files
  close() {
    for (const media of [this.video, ...this.audios]) Object.assign(media, { onerror: null, src: "" })
  }
}

const $ = selector => document.querySelector(selector)
// what the browser keeps of a page from one visit to the next, where it allows that; keep says whether it did
const recall = name => { try { return JSON.parse(localStorage[name]) } catch { return null } }
const keep = (name, value) => { try { localStorage[name] = JSON.stringify(value); return true } catch { return false } }

const make = (tag, className, ...inside) => {
  const element = Object.assign(document.createElement(tag), { className })
  element.append(...inside)
  return element
}
const saveFile = (download, text) => {
  const href = URL.createObjectURL(new Blob([text]))
  Object.assign(make("a", ""), { href, download }).click()
}
const saveJson = (download, content) => saveFile(download, JSON.stringify(content, null, 1) + "\n")
