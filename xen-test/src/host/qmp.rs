//! QEMU's machine protocol: one command at a time over a unix socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// A connection to a QEMU process.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Qmp {
    /// Connects and leaves negotiation mode. A call later fails after `limit` without an answer.
    pub fn connect(socket: &Path, limit: Duration) -> Result<Self> {
        let writer =
            UnixStream::connect(socket).with_context(|| format!("cannot reach QEMU at {}", socket.display()))?;
        writer.set_read_timeout(Some(limit))?;
        writer.set_write_timeout(Some(limit))?;
        let mut qmp = Self { reader: BufReader::new(writer.try_clone()?), writer };
        qmp.read()?;
        qmp.call("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a command; events that arrive meanwhile are dropped.
    pub fn call(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        self.writer.write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut answer = self.read()?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {}", error["desc"]);
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Runs a command of the human monitor and returns the text it answers.
    pub fn ask(&mut self, line: &str) -> Result<String> {
        let answer = self.call("human-monitor-command", &json!({"command-line": line}))?;
        Ok(answer.as_str().with_context(|| format!("QEMU on '{line}': no text"))?.trim().to_owned())
    }

    /// Runs a command of the human monitor; any text it answers is an error.
    pub fn human(&mut self, line: &str) -> Result<()> {
        match self.ask(line)?.as_str() {
            "" => Ok(()),
            said => bail!("QEMU on '{line}': {said}"),
        }
    }

    /// Ends QEMU in order: disks are flushed and closed.
    pub fn quit(mut self) -> Result<()> {
        self.call("quit", &json!({})).map(drop)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line).context("no answer from QEMU")? == 0 {
            bail!("QEMU closed its monitor: it has ended");
        }
        serde_json::from_str(&line).context("QEMU's answer is no JSON")
    }
}
