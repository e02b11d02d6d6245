//! Output for people and for scripts: tables, JSON, progress bars, sizes and times.

use std::io::{self, IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::report::StdoutClosed;

/// Stdout whose closing by the reader is told apart from any other broken pipe.
#[derive(Debug)]
pub struct Out(io::BufWriter<io::Stdout>);

impl Out {
    /// Opens stdout, buffered; flush at the end (`finish`).
    pub fn new() -> Self {
        Self(io::BufWriter::with_capacity(64 * 1024, io::stdout()))
    }

    /// Flushes what is buffered.
    pub fn finish(mut self) -> io::Result<()> {
        self.flush()
    }
}

impl Default for Out {
    fn default() -> Self {
        Self::new()
    }
}

fn closed(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::BrokenPipe {
        return io::Error::new(io::ErrorKind::BrokenPipe, StdoutClosed);
    }
    error
}

impl Write for Out {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write(buf).map_err(closed)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(closed)
    }
}

/// A text table: columns as wide as their widest cell, two spaces between.
#[derive(Debug)]
pub struct Table {
    headers: Vec<String>,
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Begins a table; a header that begins with `>` makes its column right-aligned.
    pub fn new(headers: &[&str]) -> Self {
        Self {
            right: headers.iter().map(|h| h.starts_with('>')).collect(),
            headers: headers.iter().map(|h| h.trim_start_matches('>').to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row.
    pub fn row<I: IntoIterator<Item = S>, S: Into<String>>(&mut self, cells: I) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// Says whether no row was added.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Renders all lines.
    pub fn render(&self) -> String {
        let width = |text: &str| text.chars().count();
        let mut widths: Vec<usize> = self.headers.iter().map(|h| width(h)).collect();
        for row in &self.rows {
            for (w, cell) in widths.iter_mut().zip(row) {
                *w = (*w).max(width(cell));
            }
        }
        let mut text = String::new();
        let mut line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut out = String::new();
            for ((cell, w), right) in cells.zip(&widths).zip(&self.right) {
                let pad = " ".repeat(w.saturating_sub(width(cell)));
                if *right {
                    out.push_str(&pad);
                    out.push_str(cell);
                } else {
                    out.push_str(cell);
                    out.push_str(&pad);
                }
                out.push_str("  ");
            }
            text.push_str(out.trim_end());
            text.push('\n');
        };
        line(&mut self.headers.iter().map(String::as_str));
        for row in &self.rows {
            line(&mut row.iter().map(String::as_str));
        }
        text
    }
}

/// Says a size: `1.5 GiB`; below 1 KiB in bytes.
pub fn bytes(len: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if len < 1024 {
        return format!("{len} B");
    }
    let mut value = len as f64;
    let mut unit = "B";
    for next in UNITS {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if value < 100.0 { format!("{value:.1} {unit}") } else { format!("{value:.0} {unit}") }
}

/// Says a span of time in its largest unit or two: `3d 4h`, `25m`, `12s`.
pub fn span(seconds: u64) -> String {
    let (d, h, m, s) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    match (d, h, m) {
        (0, 0, 0) => format!("{s}s"),
        (0, 0, _) => format!("{m}m"),
        (0, _, 0) => format!("{h}h"),
        (0, _, _) => format!("{h}h {m}m"),
        (_, 0, _) => format!("{d}d"),
        _ => format!("{d}d {h}h"),
    }
}

/// Says a point in time in the local zone: `2026-01-31 17:05:09`.
pub fn time(unix_ms: i64) -> String {
    jiff::Timestamp::from_millisecond(unix_ms).map_or_else(
        |_| unix_ms.to_string(),
        |at| at.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string(),
    )
}

/// Says how long ago something was: `5m ago`; `never` for None.
pub fn ago(then_ms: Option<i64>, now_ms: i64) -> String {
    match then_ms {
        None => "never".to_owned(),
        Some(then) => format!("{} ago", span(u64::try_from((now_ms - then) / 1000).unwrap_or(0))),
    }
}

/// Shows bytes that must not reach a terminal raw: control bytes and bad UTF-8 as `\xNN`.
pub fn printable(raw: &[u8]) -> String {
    let mut text = String::with_capacity(raw.len());
    for chunk in raw.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() { text.push_str(&format!("\\x{:02x}", c as u32)) } else { text.push(c) }
        }
        for b in chunk.invalid() {
            text.push_str(&format!("\\x{b:02x}"));
        }
    }
    text
}

/// Makes a progress bar over bytes; hidden where stderr is no terminal or `quiet`.
pub fn progress(len: u64, quiet: bool) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(len), target(quiet));
    let template = "{msg:20} {wide_bar:.cyan/blue} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

/// Makes a progress line without a known end.
pub fn spinner(quiet: bool) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, target(quiet));
    if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg}") {
        bar.set_style(style);
    }
    bar
}

fn target(quiet: bool) -> ProgressDrawTarget {
    if quiet || !io::stderr().is_terminal() {
        ProgressDrawTarget::hidden()
    } else {
        ProgressDrawTarget::stderr_with_hz(10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_aligns_and_leaves_no_trailing_spaces() {
        let mut table = Table::new(&["NAME", ">SIZE"]);
        table.row(["a", "10 B"]);
        table.row(["longer", "1 B"]);
        assert_eq!(table.render(), "NAME    SIZE\na       10 B\nlonger   1 B\n");
    }

    #[test]
    fn sizes_and_spans_read_well() {
        let sizes = [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (150 << 20, "150 MiB"), (u64::MAX, "16.0 EiB")];
        for (len, want) in sizes {
            assert_eq!(bytes(len), want);
        }
        for (seconds, want) in [(5, "5s"), (61, "1m"), (3600, "1h"), (90_000, "1d 1h"), (86_400, "1d")] {
            assert_eq!(span(seconds), want);
        }
    }

    #[test]
    fn hostile_names_reach_no_terminal_raw() {
        assert_eq!(printable(b"a\x1b[31m\xff\xc3\xa9"), "a\\x1b[31m\\xff\u{e9}");
    }
}
