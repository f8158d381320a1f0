//! A row kept aside whole, and read back by whatever shape its table has then (`sitepair.shadow`, `.displaced`, `.parked`).
//!
//! An image is the text of a `text[]`: the value of each column in its own output form, under the column's number
//! (`pg_attribute.attnum`). The layout beside it names table and columns, so that a column keeps its value when it is
//! renamed or retyped; one that was added since takes its default, as the row would have taken it, and one that was dropped
//! is left out. In a table made anew under the same name, columns are found by their names.
//! An image without a layout is the row as its composite type prints it, which only the same shape can read.

use tokio_postgres::types::Type;
use tokio_postgres::{Client, Row};

use super::statements;
use crate::model::names::{quote_ident, quote_literal};
use crate::model::{Result, TableName};

/// A column of a table as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageColumn {
    /// `pg_attribute.attnum`.
    number: i16,
    /// Name, unquoted.
    name: String,
    /// The type, qualified and quoted, without a modifier.
    type_sql: String,
    /// What a row that was there before the column got from it.
    default: Option<String>,
    /// Computed here: it can't be given a value.
    computed: bool,
}

/// A table as it is now: what an image is made of, and what reads one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shape {
    oid: u32,
    columns: Vec<ImageColumn>,
}

const COLUMNS: &str = "SELECT a.attrelid, a.attnum, a.attname::text, format('%I.%I', tn.nspname, t.typname), \
     CASE WHEN a.attgenerated <> '' THEN NULL \
       WHEN a.attidentity <> '' THEN format('nextval(%L::regclass)', \
         pg_get_serial_sequence(format('%I.%I', n.nspname, c.relname), a.attname)) \
       ELSE pg_get_expr(d.adbin, d.adrelid) END, a.attgenerated <> '' \
     FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
     JOIN pg_type t ON t.oid = a.atttypid JOIN pg_namespace tn ON tn.oid = t.typnamespace \
     LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum \
     WHERE $1 IN (0, c.oid) AND a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r', 'p') \
       AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'sitepair') AND n.nspname !~ '^pg_(toast|temp)' \
     ORDER BY a.attrelid, a.attnum";

/// The shapes of all user tables.
///
/// # Errors
/// What the server says.
pub async fn shapes(client: &Client) -> Result<Vec<(u32, Shape)>> {
    read_shapes(client, 0).await
}

/// Of one table, or with 0 of all.
async fn read_shapes(client: &Client, oid: u32) -> Result<Vec<(u32, Shape)>> {
    let mut shapes: Vec<(u32, Shape)> = Vec::new();
    for row in statements::rows(client, COLUMNS, &[(&oid, Type::OID)]).await? {
        let oid: u32 = statements::field(&row, 0)?;
        let column = column(&row)?;
        match shapes.last_mut() {
            Some((last, shape)) if *last == oid => shape.columns.push(column),
            Some(_) | None => shapes.push((oid, Shape { oid, columns: vec![column] })),
        }
    }
    Ok(shapes)
}

/// The shape of one table; empty where it is missing.
///
/// # Errors
/// What the server says.
pub async fn shape(client: &Client, table: &TableName) -> Result<Shape> {
    const OID: &str = "SELECT to_regclass($1)::oid";
    let Some(oid) = statements::value::<Option<u32>>(client, OID, &[(&table.sql(), Type::TEXT)]).await? else {
        return Ok(Shape::default());
    };
    Ok(read_shapes(client, oid).await?.pop().map(|(_, shape)| shape).unwrap_or_default())
}

fn column(row: &Row) -> Result<ImageColumn> {
    Ok(ImageColumn {
        number: statements::field(row, 1)?,
        name: statements::field(row, 2)?,
        type_sql: statements::field(row, 3)?,
        default: statements::field(row, 4)?,
        computed: statements::field(row, 5)?,
    })
}

impl Shape {
    /// The image of a row of this shape: an expression of type text over `row`, an alias.
    pub fn image(&self, row: &str) -> String {
        let mut values = Vec::new();
        for column in &self.columns {
            let at = usize::try_from(column.number).unwrap_or_default();
            values.resize(at.saturating_sub(1).max(values.len()), "NULL".to_owned());
            let value = format!("{row}.{}", quote_ident(&column.name));
            // The NULL test of a composite value would look at its fields, DISTINCT does not.
            values.push(format!("CASE WHEN {value} IS DISTINCT FROM NULL THEN format('%s', {value}) END"));
        }
        format!("ARRAY[{}]::pg_catalog.text[]::pg_catalog.text", values.join(", "))
    }

    /// The layout of such an image: an expression of type jsonb. It fails, as a missing column does, where the table has
    /// other columns by then.
    pub fn layout(&self) -> String {
        let names: Vec<String> = self.columns.iter().map(|column| quote_literal(&column.name)).collect();
        format!("(SELECT sitepair.layout({}::oid, ARRAY[{}]::pg_catalog.text[]))", self.oid, names.join(", "))
    }

    /// Columns that a row is inserted with, quoted.
    pub fn stored(&self) -> String {
        let names = self.columns.iter().filter(|column| !column.computed).map(|column| quote_ident(&column.name));
        names.collect::<Vec<_>>().join(", ")
    }

    /// The values of [`Shape::stored`], read from an image; over [`read`], whose alias is `sitepair_s`. `table` is its SQL
    /// name.
    pub fn values(&self, table: &str) -> String {
        let value = |column: &ImageColumn| {
            let (number, name, oid) = (column.number, &column.name, self.oid);
            let place = format!("sitepair.place(sitepair_s.sitepair_l, {oid}::oid, {number}, {})", quote_literal(name));
            let (added, kind) = (column.default.as_deref().unwrap_or("NULL"), &column.type_sql);
            format!(
                "CASE WHEN sitepair_s.sitepair_l IS NULL THEN (sitepair_s.sitepair_w::{table}).{} \
                 WHEN {place} IS NULL THEN ({added})::{kind} ELSE (sitepair_s.sitepair_v)[{place}]::{kind} END",
                quote_ident(name)
            )
        };
        let values = self.columns.iter().filter(|column| !column.computed).map(value);
        values.collect::<Vec<_>>().join(", ")
    }
}

/// A FROM item with images: `more` are further columns, `image` and `layout` expressions over `from`.
pub fn read(more: &str, image: &str, layout: &str, from: &str) -> String {
    format!(
        "(SELECT {more}{image} AS sitepair_w, {layout} AS sitepair_l, \
         CASE WHEN {layout} IS NOT NULL THEN ({image})::pg_catalog.text[] END AS sitepair_v{from} OFFSET 0) AS sitepair_s"
    )
}
