//! The programs that an administrator has, run in a dom0 as he does: what they print has to be of use to him.

use anyhow::{Context, Result, ensure};
use remusd::ops::EventKind;

use super::{Ctx, Scenario};
use crate::host::{Host, Snapshot, quote};
use crate::protection::{PATIENCE, Protected, no_copy, slow_host_options, wait_epochs, wait_event};
use crate::wait::wait_until;

pub(super) const PROGRAMS: Scenario = Scenario {
    name: "api-programs",
    about: "doctor, status, top, jobs, abort and completions as an administrator sees them",
    hosts: 2,
    start: Snapshot::Protected,
    run,
};

fn run(ctx: &mut Ctx<'_>) -> Result<()> {
    let pair = ctx.pair();
    let (a, b) = (pair.a(), pair.b());
    let protected = Protected::start(pair, "")?;
    doctor(ctx, a)?;
    status(ctx, a)?;
    top(
        ctx,
        a,
        120,
        30,
        &["1 protected", "here -> ", "pause", "dirty pages", "on the wire", "output held", "ack latency"],
    )?;
    top(ctx, a, 60, 20, &["1 protected", "protected", "dirty pages", " ms"])?;
    top(ctx, b, 120, 30, &["1 copies here", "-> here", "ready"])?;
    top(ctx, b, 60, 20, &["1 copies here", "ready"])?;
    completions(a)?;
    trace(ctx, a, b)?;
    jobs(ctx, a, b)?;
    protected.goes_on()
}

fn doctor(ctx: &Ctx<'_>, a: &Host) -> Result<()> {
    let output = a.run("remus doctor hostb --guest guest")?;
    std::fs::write(ctx.logs().join("doctor.txt"), &output.stdout)?;
    for words in ["hosta:", "hostb:", "hosta, guest guest:", "between them:", "privileges", "xl", "clock"] {
        ensure!(output.stdout.contains(words), "doctor does not say {words:?}: {}", output.stdout);
    }
    let fails = output.stdout.lines().filter(|line| line.trim_start().starts_with("FAIL")).count();
    ensure!((output.status == 0) == (fails == 0), "{fails} FAIL and exit code {}: {}", output.status, output.stdout);
    ensure!(matches!(output.status, 0 | 6), "exit code {}", output.status);
    for (line, next) in output.stdout.lines().zip(output.stdout.lines().skip(1)) {
        let bad = line.trim_start().starts_with("FAIL");
        ensure!(!bad || next.trim_start().starts_with("->"), "it does not say what to do: {line}");
    }
    let json = a.run("remus doctor hostb --guest guest --json")?;
    let value: serde_json::Value = serde_json::from_str(&json.stdout).context("doctor --json")?;
    ensure!(value["ok"] == (json.status == 0), "doctor --json: {} with exit code {}", value["ok"], json.status);
    let away = a.run("remus doctor 10.78.0.99")?;
    ensure!(away.status == 6 && away.stdout.contains("FAIL"), "doctor of a host that is away: {away:?}");
    // Something that protection needs is taken away, ssh to hosts that are not paired: it is named.
    let broken = a.run("PATH=/nonexistent /usr/bin/env -i $(command -v remus) doctor")?;
    let named = broken.stdout.lines().any(|line| line.trim_start().starts_with("FAIL  link") && line.contains("ssh"));
    ensure!(broken.status == 6 && named, "doctor with no ssh in reach: {broken:?}");
    ctx.note(&format!("doctor: {fails} FAIL here; without ssh in reach exit code {}", broken.status));
    Ok(())
}

fn status(ctx: &Ctx<'_>, a: &Host) -> Result<()> {
    let text = a.sh("remus status")?;
    ensure!(!text.contains('\x1b'), "colours although it is piped: {text:?}");
    let row = text.lines().nth(1).context("a row")?;
    for words in ["guest", "protected", "here", "ms"] {
        ensure!(row.contains(words), "status does not say {words:?}: {text}");
    }
    std::fs::write(ctx.logs().join("status.txt"), &text)?;
    let none = a.run("remus status nosuch")?;
    ensure!(none.status == 4 && none.stderr.contains("nosuch"), "status of a domain that is not there: {none:?}");
    Ok(())
}

/// The newest epochs for a viewer: every track has its slices, and they fit the order of an epoch.
fn trace(ctx: &Ctx<'_>, a: &Host, b: &Host) -> Result<()> {
    let text = a.sh("remus trace guest --epochs 3")?;
    std::fs::write(ctx.logs().join("trace.json"), &text)?;
    let value: serde_json::Value = serde_json::from_str(&text).context("remus trace")?;
    let slices: Vec<_> =
        value["traceEvents"].as_array().context("traceEvents")?.iter().filter(|event| event["ph"] == "X").collect();
    let of = |name: &str| -> Vec<(u64, u64)> {
        let named = slices.iter().filter(|slice| slice["name"].as_str().is_some_and(|n| n.starts_with(name)));
        named.filter_map(|slice| Some((slice["ts"].as_u64()?, slice["dur"].as_u64()?))).collect()
    };
    let (paused, acknowledged) = (of("paused"), of("ack"));
    ensure!(paused.len() == 3 && acknowledged.len() == 3, "three epochs: {text}");
    for (paused, ack) in paused.iter().zip(&acknowledged) {
        ensure!(paused.1 > 0 && ack.0 >= paused.0 + paused.1, "acknowledged before the guest ran again: {text}");
    }
    let copy = b.run("remus trace guest")?;
    ensure!(copy.status != 0 && !copy.stderr.is_empty(), "a trace where only the copy is: {copy:?}");
    ctx.note(&format!("the guest stood still for {:?} us", paused.iter().map(|p| p.1).collect::<Vec<_>>()));
    Ok(())
}

/// `remus top` on a terminal of this size, after some epochs; what is on its screen then.
fn top(ctx: &Ctx<'_>, host: &Host, columns: usize, lines: usize, words: &[&str]) -> Result<()> {
    let file = format!("/root/top-{columns}.raw");
    let inner = format!("stty cols {columns} rows {lines}; exec remus top");
    host.sh(&format!(
        "(sleep 12; printf q) | TERM=xterm-256color timeout 60 script -qfec {} {file} >/dev/null",
        quote(&inner)
    ))?;
    let raw = String::from_utf8_lossy(&host.pull(&file)?).into_owned();
    let screen = screen(&raw, columns, lines);
    let name = format!("top-{}-{columns}x{lines}.txt", host.name());
    std::fs::write(ctx.logs().join(name), &screen)?;
    for words in words.iter().chain(&["remus top", "guest"]) {
        ensure!(screen.contains(words), "top on host {} does not show {words:?}:\n{screen}", host.name());
    }
    let wide = screen.lines().any(|line| line.chars().count() > columns);
    ensure!(!wide && screen.lines().count() <= lines, "it does not fit {columns}x{lines}:\n{screen}");
    Ok(())
}

/// What a terminal shows of these bytes, as far as ratatui's crossterm backend uses it, before the alternate screen is left.
fn screen(raw: &str, columns: usize, lines: usize) -> String {
    let mut cells = vec![vec![' '; columns]; lines];
    let (mut row, mut column) = (0, 0);
    let mut chars = raw.chars().peekable();
    while let Some(next) = chars.next() {
        match next {
            '\x1b' if chars.peek() == Some(&'[') => {
                chars.next();
                let mut arguments = String::new();
                let end = loop {
                    match chars.next() {
                        Some(c) if c.is_ascii_alphabetic() => break c,
                        Some(c) => arguments.push(c),
                        None => break 'm',
                    }
                };
                let mut numbers = arguments.split(';').map(|n| n.parse::<usize>().unwrap_or(1));
                match end {
                    'H' => {
                        row = numbers.next().unwrap_or(1).saturating_sub(1);
                        column = numbers.next().unwrap_or(1).saturating_sub(1);
                    }
                    'J' => cells.iter_mut().for_each(|line| line.fill(' ')),
                    'l' if arguments == "?1049" => break,
                    _ => {}
                }
            }
            '\x1b' => drop(chars.next()),
            '\r' => column = 0,
            '\n' => row += 1,
            c if c >= ' ' => {
                if let Some(cell) = cells.get_mut(row).and_then(|line| line.get_mut(column)) {
                    *cell = c;
                }
                column += 1;
            }
            _ => {}
        }
    }
    let lines = cells.into_iter().map(|line| line.into_iter().collect::<String>().trim_end().to_owned());
    lines.collect::<Vec<_>>().join("\n")
}

fn completions(a: &Host) -> Result<()> {
    a.sh("remus completions bash >/root/remus.bash")?;
    for (typed, wanted) in [("un", "unprotect"), ("sw", "switchover"), ("dr", "drill"), ("com", "completions")] {
        let line = format!(
            "source /root/remus.bash; COMP_WORDS=(remus {typed}); COMP_CWORD=1; $(complete -p remus | sed 's/.*-F \\([^ ]*\\).*/\\1/') \
             remus {typed} remus; echo \"${{COMPREPLY[@]}}\""
        );
        let said = a.sh(&format!("bash -c {}", quote(&line)))?;
        ensure!(said.split_whitespace().any(|word| word == wanted), "bash completes {typed:?} to {said:?}");
    }
    Ok(())
}

fn jobs(ctx: &Ctx<'_>, a: &Host, b: &Host) -> Result<()> {
    let before = a.sh("remus jobs")?;
    ensure!(
        before.contains("protect") && before.contains("completed"),
        "the job that protected is not shown: {before}"
    );
    a.sh("remus unprotect guest")?;
    no_copy(b, "guest")?;

    // Over ssh, which emulated ciphers make slow enough to be met on the way.
    let said = a.sh(&format!("remus protect guest hostb {} --tag mine", slow_host_options()))?;
    let job: u64 = said.trim().strip_prefix("job ").context(said.clone())?.parse()?;
    let running = wait_until(PATIENCE, "the job is shown", || {
        let jobs = a.sh("remus jobs")?;
        Ok(jobs.lines().find(|line| line.trim_start().starts_with(&job.to_string())).map(str::to_owned))
    })?;
    ensure!(running.contains("protect") && running.contains("guest"), "{running}");
    wait_event(b, "guest", EventKind::Receiving)?;
    let abort = a.sh(&format!("remus abort {job}"))?;
    ensure!(abort.contains("cancelled"), "abort: {abort}");
    ensure!(a.sh("remus jobs")?.contains("cancelled"), "the aborted job is not shown as that");
    let end = wait_until(PATIENCE, "the end is told with the tag", || {
        let events = crate::protection::events(a)?;
        let tagged = |e: &remusd::ops::Event| e.operation.as_ref().is_some_and(|n| n.tag.as_deref() == Some("mine"));
        Ok(events.into_iter().find(tagged))
    })?;
    ensure!(end.operation.as_ref().is_some_and(|note| note.outcome == "cancelled"), "{end:?}");
    no_copy(b, "guest")?;
    let again = a.sh(&format!("remus abort {job}"))?;
    ensure!(again.contains("had ended before"), "abort of an ended job: {again}");
    let none = a.run("remus abort 99999")?;
    ensure!(none.status == 4, "abort of no job: {none:?}");
    std::fs::write(ctx.logs().join("jobs.txt"), a.sh("remus jobs")?)?;
    ctx.note(&format!("abort: {abort}"));

    crate::protection::protect(a, "guest", "")?;
    wait_epochs(a, "guest", 2)
}

#[cfg(test)]
mod tests {
    use super::screen;

    #[test]
    fn a_screen_is_what_was_drawn_last() {
        let raw = "\x1b[?1049h\x1b[2J\x1b[1;1H\x1b[1mremus\x1b[1;7Htop\x1b[0m\x1b[2;3Hab\x1b[2;4Hc\x1b[?1049lbye";
        assert_eq!(screen(raw, 10, 2), "remus top\n  ac");
    }
}
