//! Commands in a dom0, through the agent in the image (`overlay/agent.py` gives the wire format).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

use crate::net::NetNs;

const PORT: u16 = 7700;
/// Longest time for a command that is simply waited for.
const COMMAND_LIMIT: Duration = Duration::from_secs(600);
const CONNECT_LIMIT: Duration = Duration::from_secs(3);

/// How a command ended and what it said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Exit code, or minus the signal that ended it.
    pub status: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// Whether the exit code was 0.
    pub fn ok(&self) -> bool {
        self.status == 0
    }
}

/// Something a running command said, or its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// Bytes of standard output.
    Stdout(Vec<u8>),
    /// Bytes of standard error.
    Stderr(Vec<u8>),
    /// Exit code, or minus the signal.
    End(i32),
}

/// Runs commands in one dom0. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Agent {
    address: SocketAddr,
    /// Where to open sockets; without it in the calling thread's own namespace.
    netns: Option<Arc<NetNs>>,
    connections: Arc<Mutex<Connections>>,
}

/// The sockets of the commands that run.
#[derive(Debug, Default)]
struct Connections {
    next: u64,
    open: BTreeMap<u64, TcpStream>,
}

impl Agent {
    /// The agent of host `a` or `b`.
    pub fn of(host: &str, netns: Option<Arc<NetNs>>) -> Result<Self> {
        let number = match host {
            "a" => 1,
            "b" => 2,
            _ => bail!("'{host}' is no host: use a or b"),
        };
        let address = SocketAddr::from(([10, 78, 0, number], PORT));
        Ok(Self { address, netns, connections: Arc::default() })
    }

    fn connect(&self) -> Result<TcpStream> {
        let address = self.address;
        let connect = move || TcpStream::connect_timeout(&address, CONNECT_LIMIT);
        let stream = match &self.netns {
            None => connect(),
            Some(netns) => netns.spawn(connect)?.join().map_err(|_| anyhow!("the connecting thread panicked"))??,
        };
        let stream = stream.with_context(|| format!("no agent at {address}: is the host up?"))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connection of every running command: the host has lost power and nobody else would
    /// tell their waiters.
    pub fn sever(&self) {
        for (_, stream) in std::mem::take(&mut self.connections().open) {
            // An error means that it was closed already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Whether the agent answers (one short try).
    pub fn answers(&self) -> bool {
        self.run("true").is_ok_and(|output| output.ok())
    }

    /// Runs a bash command line in the dom0 and waits for its end. A command that fails is no
    /// error here: look at the status.
    ///
    /// # Errors
    /// The host cannot be reached or goes away.
    pub fn run(&self, command: &str) -> Result<Output> {
        self.start(command)?.wait_output()
    }

    /// Starts a bash command line with a piped standard input.
    pub fn start(&self, command: &str) -> Result<Running> {
        self.request(command, &json!({ "cmd": command }))
    }

    /// After a start from a snapshot: gives the dom0 (and through it Xen) the right time, and other
    /// random numbers than it had the last time it was there.
    pub fn wake(&self) -> Result<()> {
        let mut random = [0; 48];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        let entropy: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let time = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        let request = json!({ "cmd": "true", "wake": { "time": time, "entropy": entropy } });
        let output = self.request("waking from a snapshot", &request)?.wait_output_within(CONNECT_LIMIT * 10)?;
        if !output.ok() {
            bail!("the dom0 could not be woken from its snapshot: {}", output.stderr);
        }
        Ok(())
    }

    fn request(&self, command: &str, request: &Value) -> Result<Running> {
        let mut stream = self.connect()?;
        let request = request.to_string();
        let length = u32::try_from(request.len()).context("command line too long")?;
        stream.write_all(&length.to_be_bytes())?;
        stream.write_all(request.as_bytes())?;
        let (sender, said) = channel();
        let mut reader = stream.try_clone()?;
        let thread = std::thread::Builder::new().name("agent-reader".into()).spawn(move || {
            // A closed channel or connection is seen by the receiver as the end without status.
            let _ = read_frames(&mut reader, &sender);
        })?;
        let mut connections = self.connections();
        let id = connections.next;
        connections.next += 1;
        connections.open.insert(id, stream.try_clone()?);
        let agent = self.clone();
        drop(connections);
        Ok(Running { command: command.to_owned(), stream, said, reader: Some(thread), agent, id })
    }
}

fn read_frames(reader: &mut TcpStream, said: &Sender<Said>) -> Result<()> {
    loop {
        let mut head = [0; 5];
        reader.read_exact(&mut head)?;
        let length = u32::from_be_bytes(head[1..].try_into()?);
        let mut data = vec![0; length as usize];
        reader.read_exact(&mut data)?;
        let frame = match head[0] {
            1 => Said::Stdout(data),
            2 => Said::Stderr(data),
            3 => Said::End(i32::from_be_bytes(data.as_slice().try_into()?)),
            other => bail!("frame type {other} from the agent"),
        };
        let end = matches!(frame, Said::End(_));
        said.send(frame)?;
        if end {
            return Ok(());
        }
    }
}

/// A command that runs in a dom0. Dropping it kills the command and its process group.
#[derive(Debug)]
pub struct Running {
    command: String,
    stream: TcpStream,
    said: Receiver<Said>,
    reader: Option<JoinHandle<()>>,
    agent: Agent,
    id: u64,
}

impl Running {
    /// What the command says next; waits for it up to `limit`. `None`: nothing within the limit.
    ///
    /// # Errors
    /// The connection ended before the command did (host gone, or reset).
    pub fn next(&self, limit: Duration) -> Result<Option<Said>> {
        use std::sync::mpsc::RecvTimeoutError::{Disconnected, Timeout};
        match self.said.recv_timeout(limit) {
            Ok(said) => Ok(Some(said)),
            Err(Timeout) => Ok(None),
            Err(Disconnected) => bail!("lost the host while it ran: {}", self.command),
        }
    }

    /// A second handle on the command's standard input, for another thread.
    pub fn input(&self) -> Result<Input> {
        Ok(Input { stream: self.stream.try_clone().context("cannot duplicate a socket")? })
    }

    /// Sends bytes to the command's standard input.
    pub fn write(&mut self, data: &[u8]) -> Result<()> {
        self.input()?.write(data)
    }

    /// Ends the command's standard input.
    pub fn close_input(&mut self) -> Result<()> {
        self.input()?.close()
    }

    /// Waits for the end and returns all that was not yet read.
    ///
    /// # Errors
    /// The host was lost, or the command did not end within 10 minutes.
    pub fn wait_output(self) -> Result<Output> {
        self.wait_output_within(COMMAND_LIMIT)
    }

    /// Like [`Running::wait_output`], with a limit of one's own.
    pub fn wait_output_within(mut self, limit: Duration) -> Result<Output> {
        let start = Instant::now();
        self.close_input()?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match self.next(limit.saturating_sub(start.elapsed()))? {
                Some(Said::Stdout(data)) => stdout.extend(data),
                Some(Said::Stderr(data)) => stderr.extend(data),
                Some(Said::End(status)) => {
                    return Ok(Output {
                        status,
                        stdout: String::from_utf8_lossy(&stdout).into_owned(),
                        stderr: String::from_utf8_lossy(&stderr).into_owned(),
                    });
                }
                None => bail!("still runs after {} s: {}", limit.as_secs(), self.command),
            }
        }
    }
}

/// The standard input of a [`Running`] command.
#[derive(Debug)]
pub struct Input {
    stream: TcpStream,
}

impl Input {
    /// Sends bytes; without effect when the command has ended.
    pub fn write(&mut self, data: &[u8]) -> Result<()> {
        for part in data.chunks(65536) {
            let length = u32::try_from(part.len()).expect("a chunk is small");
            let mut frame = vec![0];
            frame.extend_from_slice(&length.to_be_bytes());
            frame.extend_from_slice(part);
            self.send(&frame)?;
        }
        Ok(())
    }

    /// Ends the input.
    pub fn close(&mut self) -> Result<()> {
        self.send(&[0; 5])
    }

    fn send(&mut self, frame: &[u8]) -> Result<()> {
        match self.stream.write_all(frame) {
            // The command has ended and its status is on the way, or there already.
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => Ok(()),
            result => result.context("lost the host"),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.agent.connections().open.remove(&self.id);
        let _ = self.stream.shutdown(Shutdown::Both);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}
