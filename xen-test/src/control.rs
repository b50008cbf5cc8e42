//! Faults by command: one line acts on a booted pair. The prompt of `shell` and `xen-test fault`
//! (through the unix socket of a run that `up` started) speak the same lines.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use crate::host::{Host, Snapshot};
use crate::pair::Pair;

/// The lines that [`act`] understands, for people.
pub const HELP: &str = "\
cut X Y       cut the link between two of a, b, client
join X Y      join it again
off HOST      power loss of a host
boot HOST     power it on again (from its disk) and wait until xl is usable
freeze HOST   stop a whole host where it stands
thaw HOST     let it go on
kill9 HOST RE kill -9 in a dom0 of what matches the expression
reset         both hosts back to where they were after the boot
snapshot      from now on, reset goes back to this moment (best without guests)";

/// Name of the control socket in a run's directory.
pub const SOCKET: &str = "control";

/// Does what a line says.
///
/// # Errors
/// The line is not understood, or what it asks for failed.
pub fn act(pair: &Pair, line: &str) -> Result<()> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        ["cut", one, other] => pair.cut(one.parse()?, other.parse()?),
        ["join", one, other] => pair.join(one.parse()?, other.parse()?),
        ["off", host] => {
            find(pair, host)?.power_off();
            Ok(())
        }
        ["boot", host] => find(pair, host)?.boot(),
        ["freeze", host] => find(pair, host)?.freeze(),
        ["thaw", host] => find(pair, host)?.thaw(),
        ["kill9", host, pattern @ ..] if !pattern.is_empty() => find(pair, host)?.kill9(&pattern.join(" ")),
        ["reset"] => pair.reset(Snapshot::Ready),
        ["snapshot"] => pair.snapshot(Snapshot::Ready),
        _ => bail!("not understood: {line}\n{HELP}"),
    }
}

fn find<'p>(pair: &'p Pair, name: &str) -> Result<&'p Host> {
    pair.hosts().iter().find(|host| host.name() == name).with_context(|| format!("no host '{name}' in this run"))
}

/// Answers lines on the run's control socket until the pair is dropped elsewhere.
pub fn serve(pair: &Arc<Pair>) -> Result<()> {
    let socket = pair.run_dir().join(SOCKET);
    let listener = UnixListener::bind(&socket).context("cannot make the control socket")?;
    let pair = Arc::downgrade(pair);
    std::thread::Builder::new().name("control".into()).spawn(move || {
        for stream in listener.incoming().flatten() {
            let Some(pair) = pair.upgrade() else { break };
            std::thread::spawn(move || answer(&pair, stream));
        }
    })?;
    Ok(())
}

fn answer(pair: &Pair, mut stream: UnixStream) -> Result<()> {
    let mut line = String::new();
    BufReader::new(stream.try_clone()?).read_line(&mut line)?;
    let reply = match act(pair, &line) {
        Ok(()) => "ok".to_owned(),
        Err(error) => format!("{error:#}"),
    };
    Ok(stream.write_all(reply.as_bytes())?)
}

/// Sends a line to the run whose directory is `dir` and waits until it is done.
pub fn ask(dir: &Path, line: &str) -> Result<()> {
    let mut stream =
        UnixStream::connect(dir.join(SOCKET)).context("the run takes no faults: was it started with `up`?")?;
    stream.write_all(format!("{line}\n").as_bytes())?;
    let reply = std::io::read_to_string(stream)?;
    if reply != "ok" {
        bail!("{reply}");
    }
    Ok(())
}
