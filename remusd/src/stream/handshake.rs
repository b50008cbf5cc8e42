//! What `xl migrate-receive` and its sender say to each other outside the streams (tools/xl/xl_migrate.c of Xen 4.17).

/// The receiver's first words, before anything is sent to it. No NUL.
pub const BANNER: &[u8] = b"xl migration receiver ready, send binary domain data.\n";

/// The plain receiver has rebuilt the domain; it stands paused as `<name>--incoming`. With NUL.
pub const READY: &[u8] = b"domain received, ready to unpause\0";

/// Tells the plain receiver to rename and unpause its copy. Anything else, or the end of the pipe, makes it destroy the copy. With NUL.
pub const GO: &[u8] = b"domain is yours, you are cleared to unpause\0";

/// The plain receiver's report, followed by one byte: 0 when the copy runs. With NUL.
pub const REPORT: &[u8] = b"my copy unpause results are as follows\0";

/// What xl appends to the name of a domain that is being received.
pub const INCOMING_SUFFIX: &str = "--incoming";
